"""Sums of branches are one conv however code spells them: as stacks, means, weighted sums, and with branches that share a conv."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.blocks.squeezed_form import forms_in
from repfx.rewriting.squeezed_regions import regions_of
from tests.inline_net import Net, convs, error_of, fused_exactly, image, norms, ready, reasons

CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZES = {1: (2, 4, 11), 2: (2, 4, 9, 10), 3: (2, 4, 4, 5, 6)}


def net(forward: Callable[[Any, Any], Any], dimensions: int = 2, **options: Any) -> Net:
    """A net with three branches: a conv with a BatchNorm, a conv with a bias, and a BatchNorm."""
    conv, norm = CONVS[dimensions], NORMS[dimensions]
    branches = nn.ModuleList(
        [
            nn.Sequential(conv(4, 4, 3, padding=1, bias=False, **options), norm(4)),
            conv(4, 4, 1, **options),
            norm(4) if not options else nn.Sequential(conv(4, 4, 1, **options), norm(4)),
        ]
    )
    return Net(forward, branches=branches, alpha=nn.Parameter(torch.randn(3)), dimensions=dimensions)


def outputs(m: Any, x: Any) -> list[Any]:
    return [branch(x) for branch in m.branches]


def with_alpha(m: Any, x: Any) -> Any:
    a, b, c = outputs(m, x)
    return torch.add(a, b, alpha=2).sub(c, alpha=0.25)


FIXED: dict[str, Callable[[Any, Any], Any]] = {  # the factors are numbers
    "sum": lambda m, x: sum(outputs(m, x)),
    "sum from a start": lambda m, x: sum(outputs(m, x), x),
    "reduce": lambda m, x: functools.reduce(operator.add, outputs(m, x)),
    "a stack": lambda m, x: torch.stack(outputs(m, x)).sum(0),
    "a stack along another axis": lambda m, x: torch.sum(torch.stack(outputs(m, x), dim=2), dim=(2,)),
    "a mean": lambda m, x: torch.stack(outputs(m, x)).mean(dim=0),
    "a mean by function": lambda m, x: torch.mean(torch.stack(outputs(m, x), 0), 0),
    "factors": with_alpha,
    "a mean in a sum": lambda m, x: x + torch.stack(outputs(m, x)).mean(0),
    "a sum in a mean": lambda m, x: torch.stack([m.branches[0](x), m.branches[1](x) + m.branches[2](x)]).mean(0),
}
LETTERS = {1: "bcw", 2: "bchw", 3: "bcdhw"}


def by_einsum(m: Any, x: Any) -> Any:
    letters = LETTERS[m.dimensions]
    return torch.einsum(f"k, k{letters} -> {letters}", F.softmax(m.alpha, 0), torch.stack(outputs(m, x)))


def by_einsum_behind(m: Any, x: Any) -> Any:
    letters = LETTERS[m.dimensions]
    return torch.einsum(f"{letters}k,k->{letters}", torch.stack(outputs(m, x), m.dimensions + 2), m.alpha)


WEIGHTED: dict[str, Callable[[Any, Any], Any]] = {  # the factors are computed from parameters
    "zip": lambda m, x: sum(w * branch(x) for w, branch in zip(F.softmax(m.alpha, dim=0), m.branches)),
    "zip with a parameter": lambda m, x: sum(w * branch(x) for w, branch in zip(m.alpha, m.branches)),
    "enumerate": lambda m, x: sum(m.alpha.sigmoid()[i] * branch(x) for i, branch in enumerate(m.branches)),
    "unbind": lambda m, x: sum(w * branch(x) for w, branch in zip(m.alpha.tanh().unbind(0), m.branches)),
    "einsum": by_einsum,
    "einsum, stacked behind": by_einsum_behind,
}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("name", [*FIXED, *WEIGHTED])
def test_a_sum_is_one_conv(name: str, dimensions: int) -> None:
    model = net({**FIXED, **WEIGHTED}[name], dimensions)
    fused = fused_exactly(model, image(*SIZES[dimensions]))
    assert (len(convs(fused)), norms(fused)) == (1, []), reasons(fused)


@pytest.mark.parametrize("options", [{"stride": 2}, {"groups": 2}])
@pytest.mark.parametrize("name", ["a stack", "a mean", "factors", "zip", "einsum"])
def test_a_sum_of_convs_with_strides_and_groups_is_one_conv(name: str, options: dict[str, int]) -> None:
    fused = fused_exactly(net({**FIXED, **WEIGHTED}[name], **options), image())
    assert (len(convs(fused)), norms(fused)) == (1, []), reasons(fused)


ops: Any = operator  # the stubs have no types


def trained(model: Any) -> None:
    """Change all parameters, as a step of training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", [*FIXED, *WEIGHTED])
def test_a_squeezed_sum_follows_its_parameters(name: str) -> None:
    model = ready(net({**FIXED, **WEIGHTED}[name])).train(name in FIXED)
    squeezed = repfx.squeeze(model, statistics="frozen")
    assert forms_in(squeezed)
    if name in FIXED:
        assert len(regions_of(squeezed)) == 1
    reference = net({**FIXED, **WEIGHTED}[name]).double()
    trained(squeezed)
    reference.load_state_dict(squeezed.state_dict())
    assert error_of(squeezed, reference.eval(), image()) < 1e-9


@pytest.mark.parametrize("name", ["sum", "a mean", "factors", "a sum in a mean", "zip", "einsum"])
def test_a_sum_is_restored(name: str) -> None:
    model = ready(net({**FIXED, **WEIGHTED}[name]))
    restored = repfx.restore(repfx.fuse(model))
    assert norms(restored)
    assert error_of(restored, model, image()) < 1e-9


@pytest.mark.parametrize("name", FIXED)
def test_a_sum_with_a_foreign_term_keeps_that_term(name: str) -> None:
    model: Any = net(FIXED[name])
    model.branches.append(nn.Sequential(nn.ReLU()))
    if name == "factors":
        model.function = lambda m, x: torch.add(m.branches[0](x) + m.branches[1](x), m.branches[3](x), alpha=0.5)
    fused = fused_exactly(model, image())
    assert "branches.0.0" in called(fused), reasons(fused)
    assert len(called(fused)) == (1 if name == "a sum in a mean" else 2)


def called(fused: Any) -> list[str]:
    """The paths of all layers that a graph calls."""
    return [str(node.target) for node in fused.graph.nodes if node.op == "call_module"]


SHARED: dict[str, Callable[[Any, Any], Any]] = {
    "a conv raw and normed": lambda m, x: (lambda y: y + m.norm(y))(m.a(x)),
    "a conv in two branches": lambda m, x: (lambda y: m.b(y) - m.norm(y) + x)(m.a(x)),
    "in place": lambda m, x: (lambda y: ops.iadd(m.norm(y), y))(m.a(x)),
}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("name", SHARED)
def test_branches_may_share_a_conv(name: str, dimensions: int) -> None:
    conv = CONVS[dimensions]
    model = Net(SHARED[name], a=conv(4, 4, 3, padding=1), b=conv(4, 4, 1), norm=NORMS[dimensions](4))
    fused = fused_exactly(model, image(*SIZES[dimensions]))
    assert (called(fused), norms(fused)) == (["a"], []), reasons(fused)
    squeezed = repfx.squeeze(ready(model).train(), statistics="frozen")
    trained(squeezed)
    reference = Net(SHARED[name], a=conv(4, 4, 3, padding=1), b=conv(4, 4, 1), norm=NORMS[dimensions](4)).double()
    reference.load_state_dict(squeezed.state_dict())
    assert error_of(squeezed, reference.eval(), image(*SIZES[dimensions])) < 1e-9


def changed_before_it_is_normed(m: Any, x: Any) -> Any:
    y = m.a(x)
    z = y.mul_(2)
    return z + m.norm(y)


def changed_after_it_was_normed(m: Any, x: Any) -> Any:
    y = m.a(x)
    z = m.norm(y)
    y += 1
    return z + y


def read_outside(m: Any, x: Any) -> Any:
    y = m.a(x)
    return (y + m.norm(y)).relu() + y.mean()


@pytest.mark.parametrize("function", [changed_before_it_is_normed, changed_after_it_was_normed, read_outside])
def test_a_shared_conv_that_changes_or_is_read_outside_is_computed_right(function: Callable[[Any, Any], Any]) -> None:
    fused_exactly(Net(function, a=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4)), image())


# ---- crops


def cropped(m: Any, x: Any) -> Any:
    """ACB with a padding that is too small for its bars: they see a cropped picture."""
    whole, inner = slice(None), slice(1, -1)
    out = m.square(x)
    for axis, bar in enumerate(m.bars):
        parts = [whole, whole, *(whole if axis == own else inner for own in range(m.dimensions))]
        out = out + bar(x[tuple(parts)])
    return out


def cropped_by_ellipsis(m: Any, x: Any) -> Any:
    behind = (slice(1, -1),) * m.dimensions
    return m.square(x) + m.point(x[(..., *behind)])


def cropped_by_padding(m: Any, x: Any) -> Any:
    return m.square(x) + m.point(F.pad(x, (-1,) * 2 * m.dimensions))


def cropped_by_half(m: Any, x: Any) -> Any:
    shifted = (slice(None), slice(None), *(slice(2, None),) * m.dimensions)
    return m.square(x) + m.point(x[shifted])


CROPPED = (cropped, cropped_by_ellipsis, cropped_by_padding, cropped_by_half)


@pytest.mark.parametrize(
    ("function", "dimensions"), [(f, n) for f in CROPPED for n in (1, 2, 3) if (f, n) != (cropped, 1)]
)
def test_a_branch_that_sees_a_cropped_picture_is_merged(function: Callable[[Any, Any], Any], dimensions: int) -> None:
    conv, norm = CONVS[dimensions], NORMS[dimensions]
    bars = [
        nn.Sequential(conv(4, 4, tuple(3 if axis == own else 1 for own in range(dimensions)), bias=False), norm(4))
        for axis in range(dimensions)
    ]
    layers = {"square": nn.Sequential(conv(4, 4, 3), norm(4)), "point": conv(4, 4, 1), "bars": nn.ModuleList(bars)}
    fused = fused_exactly(Net(function, **layers, dimensions=dimensions), image(*SIZES[dimensions]))
    assert called(fused) == ["square.0"], reasons(fused)


NOT_CROPPED: dict[str, Callable[[Any, Tensor], Any]] = {
    "by the size of the input": lambda m, x: m.a(x) + m.b(x[:, :, 1 : x.shape[2] - 1, 1:-1]),
    "every other position": lambda m, x: m.a(x)[:, :, ::2, ::2] + m.c(x[:, :, ::2, 1:-1][:, :, :4, ::2]),
    "from the front": lambda m, x: m.a(x) + m.b(x[:, :, :7, 1:-1]),
    "a fixed number from the back": lambda m, x: m.a(x) + m.b(x[:, :, -7:, 1:-1]),
    "channels": lambda m, x: m.a(x) + m.d(x[:, :3, 1:-1, 1:-1]),
}


@pytest.mark.parametrize("name", NOT_CROPPED)
def test_other_parts_of_a_picture_are_no_crops(name: str) -> None:
    layers = {"a": nn.Conv2d(4, 4, 3), "b": nn.Conv2d(4, 4, 1), "c": nn.Conv2d(4, 4, 1), "d": nn.Conv2d(3, 4, 1)}
    fused = fused_exactly(Net(NOT_CROPPED[name], **layers), image())
    assert len(called(fused)) == 2

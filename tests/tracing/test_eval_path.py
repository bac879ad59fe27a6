"""Modules with branches in training mode, and one conv of a composed weight in eval mode: `fuse` takes the eval path if nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.errors import InvalidInput
from repfx.rewriting.pipeline import rewrite
from repfx.rewriting.rule import RULES
from repfx.testing import assert_equivalent
from repfx.tracing.trace import trace
from tests.inline_net import Net, convs, error_of, fused_exactly, image, norms, ready, reasons


class Branches(nn.Module):
    """A k×k with a BatchNorm and a 1×1, of one weight in eval mode."""

    def __init__(self, dimensions: int = 2, groups: int = 1, stride: int = 1, *, bias: bool = True) -> None:
        super().__init__()
        conv, norm = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"BatchNorm{dimensions}d")
        self.dense = conv(4, 8, 3, stride, 1, groups=groups, bias=bias)
        self.norm, self.pointwise = norm(8), conv(4, 8, 1, stride, groups=groups, bias=False)
        self.function = getattr(F, f"conv{dimensions}d")

    def composed(self) -> tuple[Tensor, Tensor]:
        scale = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        shape = [-1, *[1] * (self.dense.weight.ndim - 1)]
        padded = F.pad(self.pointwise.weight, [1] * 2 * (self.dense.weight.dim() - 2))
        bias = 0 if self.dense.bias is None else self.dense.bias
        return self.dense.weight * scale.view(shape) + padded, self.norm.bias + (bias - self.norm.running_mean) * scale

    def together(self, x: Tensor) -> Any:
        weight, bias = self.composed()
        return self.function(x, weight, bias, self.dense.stride, 1, groups=self.dense.groups)

    def forward(self, x: Tensor) -> Any:
        if self.function is None:
            return F.conv2d(x, self.dense.weight)
        if self.training:
            return self.norm(self.dense(x)) + self.pointwise(x)
        return self.together(x)


class LastLine(Branches):
    """Branches whose code asks for eval mode first, with an activation behind both paths."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.activation = nn.Sequential(nn.PReLU(8), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            y = F.conv2d(x, self.dense.weight) if self.function is None else self.together(x)
        else:
            y = self.norm(self.dense(x))
            y += self.pointwise(x)
        return self.activation(y)


@pytest.mark.parametrize("kind", [Branches, LastLine])
@pytest.mark.parametrize(
    ("dimensions", "groups", "stride", "bias"), [(1, 2, 1, True), (2, 1, 2, False), (3, 4, 1, True)]
)
def test_the_eval_path_is_the_one_conv(kind: Any, dimensions: int, groups: int, stride: int, bias: bool) -> None:
    behind = getattr(nn, f"Conv{dimensions}d")(8, 4, 1, groups=groups)
    model = nn.Sequential(kind(dimensions, groups, stride, bias=bias), behind)
    x = image(2, 4, *(9, 10, 7)[:dimensions])
    fused = fused_exactly(model, x)
    assert norms(fused) == []
    assert len(convs(fused)) == (1 if kind is Branches else 2)
    report = repfx.report(fused)
    assert [note.path for note in report.notes] == ["0"]
    assert "Note '0': it asks for its mode" in str(report)
    if kind is Branches:
        assert torch.equal(fused.train()(x), fused.eval()(x))
    else:
        assert not torch.equal(fused.train()(x), fused(x))


def test_the_fused_form_is_trained_further() -> None:
    fused: Any = fused_exactly(nn.Sequential(Branches(), nn.ReLU()), image()).train()
    fused(image()).sum().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())
    assert len(list(fused.parameters())) == 2


def test_other_code_around_it_keeps_both_modes() -> None:
    def forward(m: Any, x: Any) -> Any:
        return F.dropout(m.block(m.before(x)), 0.5, m.block.training)

    model = Net(forward, before=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), block=Branches())
    fused = fused_exactly(model, image())
    assert (convs(fused), norms(fused)) == (["before.0", "block.conv2d"], [])
    assert bool((fused.train()(image()) == 0).any())


def test_it_is_an_island_in_code_that_can_t_be_traced() -> None:
    model = Net(lambda m, x: m.block(x) if float(x.sum()) < 1e9 else x, block=Branches())
    fused = fused_exactly(model, image())
    assert (convs(fused), norms(fused)) == (["block.conv2d"], [])
    assert [note.path for note in repfx.report(fused).notes] == ["block"]


# ---- what the eval path would lose


class Dropping(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            return self.drop(self.norm(self.dense(x))) + self.pointwise(x)
        return self.together(x) if self.function else F.conv2d(x, self.dense.weight)


class DroppingInCode(Branches):
    def forward(self, x: Tensor) -> Any:
        if self.training:
            return F.dropout(self.norm(self.dense(x)), 0.3) + self.pointwise(x)
        return self.together(x) if self.function else F.conv2d(x, self.dense.weight)


class Averaged(Branches):
    """A conv that has an average of the weights in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.average = nn.Parameter(torch.randn(8, 4, 3, 3), requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            return self.dense(x)
        return F.conv2d(x, self.average + 0 * self.dense.weight, self.dense.bias, padding=1)


class AveragedInABuffer(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.randn(8, 4, 3, 3))

    def forward(self, x: Tensor) -> Any:
        return self.dense(x) if self.training else F.conv2d(x, self.average, padding=1)  # type: ignore[arg-type]


class WithAHead(Branches):
    def forward(self, x: Tensor) -> Any:
        if self.training:
            y = self.norm(self.dense(x)) + self.pointwise(x)
            return y, y.mean()
        return self.together(x) if self.function else F.conv2d(x, self.dense.weight)


class WithALayerOfItsOwn(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.after = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            return self.norm(self.dense(x)) + self.pointwise(x)
        return self.after(self.together(x) if self.function else F.conv2d(x, self.dense.weight))


class Activated(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        if self.training:
            return self.activation(self.norm(self.dense(x)) + self.pointwise(x))
        return self.together(x) if self.function else F.conv2d(x, self.dense.weight)


class Observed(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.dense.register_forward_hook(do_nothing)


def do_nothing(*arguments: Any) -> None: ...


class NothingComposed(Branches):
    def forward(self, x: Tensor) -> Any:
        if self.training:
            return F.conv2d(x, self.dense.weight, padding=1) * 2
        return F.conv2d(x, self.dense.weight, padding=1)


LOSSES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (Dropping, "eval mode doesn't call drop"),
    "dropout in code": (DroppingInCode, "its dropout would be lost"),
    "another weight": (Averaged, "its eval path has a weight that training mode doesn't use: average"),
    "a buffer": (AveragedInABuffer, "its eval path has a weight that training mode doesn't use: average"),
    "another output": (WithAHead, "it returns several values"),
    "another layer": (WithALayerOfItsOwn, "training mode doesn't call after"),
    "an activation": (Activated, "eval mode doesn't call activation"),
    "a layer with a hook": (Observed, "eval mode doesn't call dense"),
    "nothing composed": (NothingComposed, "its eval path computes no conv of composed weights"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_module_that_would_lose_something_keeps_both_modes(case: str) -> None:
    build, reason = LOSSES[case]
    model = ready(nn.Sequential(build()))
    fused = fused_exactly(model, image())
    assert type(fused.get_submodule("0")).__name__ == build.__name__
    assert f"different things in training and in eval mode; {reason}" in reasons(fused)
    assert repfx.report(fused).notes == ()


class Writing(Branches):
    """Writes the weight into a conv, as SPAN's block does."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            return F.conv2d(x, self.dense.weight, padding=1) + self.pointwise(x)
        weight, bias = self.composed()
        self.whole.weight.data, self.whole.bias.data = weight.detach(), bias.detach()  # type: ignore[union-attr]
        return self.whole(x)


class Keeping(Branches):
    """Keeps the weight as an attribute."""

    def forward(self, x: Tensor) -> Any:
        if self.training:
            return F.conv2d(x, self.dense.weight, padding=1) + self.pointwise(x)
        self.kept = self.composed()[0]
        return F.conv2d(x, self.kept, padding=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Writing, "code assigns the attribute 'data' of a tensor"),
        (Keeping, "code keeps what it computes from 'dense.weight'"),
    ],
)
def test_a_module_that_writes_into_itself_stays(build: Any, reason: str) -> None:
    model = ready(nn.Sequential(build(), nn.ReLU()))
    x = image()
    with torch.no_grad():
        expected = model(x)
    fused = repfx.fuse(model)
    assert torch.equal(fused(x), expected)
    assert reason in reasons(fused)
    assert torch.equal(repfx.expand(model, "repvgg")(x), expected)


# ---- the other verbs


@pytest.mark.slow
def test_expand_squeeze_and_other_passes_leave_it_alone() -> None:
    model = ready(nn.Sequential(Branches(), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)))
    assert trace(model).notes == {}
    expanded = repfx.expand(model, "repvgg")
    assert {
        path.partition(".")[0] for path, module in expanded.named_modules() if type(module).__name__ == "RepBlock"
    } == {"2"}
    assert error_of(expanded, model, image()) < 1e-9
    with pytest.raises(InvalidInput, match="different things in training and in eval mode"):
        repfx.squeeze(model, statistics="frozen")
    assert error_of(repfx.squeeze(expanded, statistics="frozen"), model, image()) < 1e-9
    without = [rule for name, rule in RULES.items() if name != "compute_weights"]
    kept = rewrite(ready(nn.Sequential(Branches())), without, "other")
    assert kept.report.notes == ()
    assert len(norms(kept.model)) == 1


def test_what_is_expanded_around_it_is_fused_again() -> None:
    model = ready(nn.Sequential(Branches(), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)))
    expanded = repfx.expand(model, "dbb")
    fused = repfx.fuse(ready(expanded, seed=1), strict=True)
    assert_equivalent(fused, expanded, image())
    assert (len(convs(fused)), norms(fused)) == (2, [])
    assert repfx.check_equivalent(expanded, fused, image()).equivalent


def test_restore_keeps_the_one_conv() -> None:
    model = ready(nn.Sequential(Branches(), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)))
    restored = repfx.restore(repfx.fuse(model)).eval()
    assert error_of(restored, model, image()) < 1e-9
    assert norms(restored) == ["3"]
    with pytest.raises(RuntimeError, match=r"0\.conv2d\.weight"):
        model.load_state_dict(restored.state_dict())

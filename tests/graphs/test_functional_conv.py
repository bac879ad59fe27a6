"""Convs whose weight is computed in forward: `fuse` makes them plain convs, and everything around them folds as usual."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import std_conv
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

import repfx
from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.graphs.constants import _BY_CHANCE
from repfx.graphs.trace import trace
from repfx.testing import assert_equivalent, randomize_batch_norm

X = torch.randn(2, 4, 7, 8, dtype=torch.float64)


def counts(model: nn.Module) -> tuple[int, int]:
    return sum(map(is_conv, model.modules())), sum(map(is_batch_norm, model.modules()))


def fused(model: nn.Module, x: Tensor = X) -> nn.Module:
    model = randomize_batch_norm(model.double()).eval()
    keys = set(model.state_dict())
    result: nn.Module = repfx.fuse(model)
    assert_equivalent(result, model, x)
    assert set(model.state_dict()) == keys
    return result


class Calling(nn.Module):
    """A module with its own weight and a call of a function with that weight."""

    def __init__(self, call: Any, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(6))
        self.call = call

    def forward(self, x: Tensor) -> Any:
        if self.call is None:
            return F.conv2d(x, self.weight)
        return self.call(x, self)


CALLS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "plain": (lambda x, m: F.conv2d(x, m.weight, m.bias), (6, 4, 3, 3)),
    "all by position": (lambda x, m: F.conv2d(x, m.weight, m.bias, 2, (1, 0), 2, 2), (6, 2, 2, 3)),
    "all by name": (
        lambda x, m: F.conv2d(input=x, weight=m.weight, stride=(2, 1), padding=1, dilation=[1, 2], groups=2),
        (6, 2, 3, 2),
    ),
    "same": (lambda x, m: F.conv2d(x, m.weight, padding="same"), (6, 4, 3, 1)),
    "transposed": (
        lambda x, m: F.conv_transpose2d(x, m.weight, m.bias, stride=2, padding=1, output_padding=1, groups=2),
        (4, 3, 3, 3),
    ),
    "centered": (lambda x, m: F.conv2d(x, m.weight - m.weight.mean((2, 3), keepdim=True)), (6, 4, 3, 3)),
    "masked in place": (lambda x, m: F.conv2d(x, m.weight.clone().mul_(2).abs()), (6, 4, 3, 3)),
    "by einsum": (lambda x, m: F.conv2d(x, torch.einsum("oihw,i->oihw", m.weight, m.weight[0, :, 0, 0])), (6, 4, 1, 2)),
}


@pytest.mark.parametrize("case", [case for case in CALLS if case != "masked in place"])
def test_a_call_becomes_a_conv_and_the_norm_behind_it_folds(case: str) -> None:
    call, shape = CALLS[case]
    result = fused(nn.Sequential(Calling(call, *shape), nn.BatchNorm2d(6), nn.ReLU()))
    assert counts(result) == (1, 0), str(repfx.report(result))


def test_a_weight_that_is_written_to_on_the_way_stays_as_it_is() -> None:
    call, shape = CALLS["masked in place"]
    result = fused(nn.Sequential(Calling(call, *shape), nn.BatchNorm2d(6)))
    assert counts(result) == (0, 1)


def test_what_is_computed_from_the_input_or_by_chance_is_no_weight() -> None:
    def dynamic(x: Tensor, m: Any) -> Tensor:
        return F.conv2d(x, m.weight * x.mean())

    def noisy(x: Tensor, m: Any) -> Tensor:
        return F.conv2d(x, m.weight + 0 * torch.randn_like(m.weight))

    for call in (dynamic, noisy):
        result = fused(nn.Sequential(Calling(call, 6, 4, 3, 3), nn.BatchNorm2d(6)))
        assert counts(result) == (0, 1)


# an example of each kind of function that draws numbers, or takes what lies in memory
DRAWS: dict[str, Any] = {
    "rand": torch.rand_like,
    "normal": torch.normal,
    "bernoulli": lambda w: torch.bernoulli(torch.sigmoid(w)),
    "multinomial": lambda w: torch.multinomial(torch.softmax(torch.flatten(w, 1), 1), 3),
    "binomial": lambda w: torch.binomial(torch.full_like(w, 5), torch.sigmoid(w)),
    "poisson": lambda w: torch.poisson(torch.abs(w)),
    "dropout": lambda w: F.dropout(w, training=True),
    "empty": torch.empty_like,
    "exponential": lambda w: torch.clone(w).exponential_(),
    "gumbel": lambda w: F.gumbel_softmax(w),
    "rrelu": lambda w: F.rrelu(w, training=True),
    "fractional_max_pool": lambda w: F.fractional_max_pool2d(w, (2, 1), output_size=(2, 2)),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_a_weight_that_is_drawn_is_drawn_anew(draw: str) -> None:
    def noisy(x: Tensor, m: Any) -> Tensor:
        return F.conv2d(x, m.weight + 0 * DRAWS[draw](m.weight).sum())

    result = repfx.fuse(randomize_batch_norm(nn.Sequential(Calling(noisy, 6, 4, 3, 2), nn.BatchNorm2d(6))).eval())
    assert counts(result) == (0, 1)


def test_each_kind_of_drawing_has_an_example() -> None:
    assert DRAWS.keys() == set(_BY_CHANCE)


def test_every_function_of_torch_that_draws_is_known() -> None:
    """Torch tags its operators that draw. Those that write in place are no constants anyway, and recurrent layers compute no weight."""
    recurrent = {"gru", "lstm", "miopen_rnn", "rnn_relu", "rnn_tanh"}
    public = set()
    for name, _, overload in (each.partition(".") for each in torch._C._dispatch_get_all_op_names()):
        space, _, name = name.partition("::")
        if space == "aten" and hasattr(torch, name) and not name.startswith("_") and not name.endswith("_"):
            operator = getattr(getattr(torch.ops.aten, name), overload or "default")
            public |= {name} if torch.Tag.nondeterministic_seeded in operator.tags else set()
    assert {"bernoulli", "binomial", "multinomial", "poisson", "normal", "rand"} <= public
    assert [name for name in sorted(public - recurrent) if not any(part in name for part in _BY_CHANCE)] == []


def test_a_weight_with_two_readers_is_not_copied() -> None:
    def twice(x: Tensor, m: Any) -> Tensor:
        return F.conv2d(x, m.weight) + F.conv2d(x * 2, m.weight)

    result = fused(nn.Sequential(Calling(twice, 6, 4, 3, 3), nn.BatchNorm2d(6)))
    assert counts(result) == (0, 1)
    assert "read elsewhere" in str(repfx.report(result))


def test_dtype_and_training_are_the_parameter_s() -> None:
    model = nn.Sequential(Calling(CALLS["centered"][0], 6, 4, 3, 3), nn.BatchNorm2d(6)).bfloat16().eval()
    conv: Any = next(module for module in repfx.fuse(model).modules() if is_conv(module))
    assert conv.weight.dtype is torch.bfloat16
    assert conv.weight.requires_grad
    model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in repfx.fuse(model).parameters())


@pytest.mark.parametrize(
    "kind", [std_conv.StdConv2d, std_conv.StdConv2dSame, std_conv.ScaledStdConv2d, std_conv.ScaledStdConv2dSame]
)
@pytest.mark.parametrize("whole", [True, False])
def test_timm_s_standardizing_convs(kind: Any, whole: bool) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = kind(4, 6, 3, stride=2)
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Any:
            if not whole and x.sum() == 0:
                return x
            return self.norm(self.conv(x))

    result = fused(Around())
    assert counts(result) == (1, 0 if whole else 1), str(repfx.report(result))
    convs = {path: type(module) for path, module in result.named_modules() if is_conv(module)}
    # untraceable code may read the conv's weight, so the conv becomes a plain one only where it remains a conv
    assert convs == {"conv": kind if kind.__name__.endswith("Same") and not whole else nn.Conv2d}


def test_timm_s_dynamic_same_padding_depends_on_the_input_and_folds_all_the_same() -> None:
    model = nn.Sequential(Conv2dSame(4, 6, 3, stride=2), nn.BatchNorm2d(6)).double().eval()
    result = fused(model)
    assert counts(result) == (1, 0), str(repfx.report(result))
    for size in ((5, 6), (8, 9), (7, 7)):
        assert_equivalent(result, model, torch.randn(2, 4, *size, dtype=torch.float64))


def test_a_model_of_standardized_convs_is_fused_whole() -> None:
    model = timm.create_model("test_nfnet")
    assert [island.path for island in trace(model).islands] == [""]
    result = fused(model, torch.randn(2, 3, 64, 96, dtype=torch.float64))
    assert {type(module) for module in result.modules() if is_conv(module)} == {nn.Conv2d}

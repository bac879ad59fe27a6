"""Convs whose weight is computed in forward: `fuse` makes them plain convs, and everything around them folds as usual."""

from __future__ import annotations

from collections.abc import Callable
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
from repfx.testing import assert_equivalent, randomize_batch_norm
from repfx.tracing.trace import trace

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

    reasons = {
        dynamic: "its weight or sizes depend on the input",
        noisy: "randn_like isn't computed from parameters alone",
    }
    for call, reason in reasons.items():
        result = fused(nn.Sequential(Calling(call, 6, 4, 3, 3), nn.BatchNorm2d(6)))
        assert counts(result) == (0, 1)
        assert reason in str(repfx.report(result))


# ---- casts and moves


class Residual(nn.Module):
    """A 1×1 conv beside the identity, with the identity's weight moved to the conv's, as DBB's own code has it."""

    def __init__(self, dimensions: int, groups: int, move: Callable[[Tensor, Tensor], Tensor], *, saved: bool) -> None:
        super().__init__()
        self.call, self.groups, self.move = getattr(F, f"conv{dimensions}d"), groups, move
        self.weight = nn.Parameter(torch.randn(4, 4 // groups, *[1] * dimensions))
        unit = torch.eye(4 // groups).repeat(groups, 1).reshape(self.weight.shape)
        if saved:
            self.register_buffer("unit", unit)
        else:
            self.unit = unit

    def forward(self, x: Tensor) -> Any:
        weight = self.weight + self.move(self.unit, self.weight)
        return (
            F.conv2d(x, weight, groups=self.groups)
            if self.call is F.conv2d
            else self.call(x, weight, groups=self.groups)
        )


MOVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "to a device": lambda unit, weight: unit.to(weight.device),
    "to a device and a dtype": lambda unit, weight: unit.to(device=weight.device, dtype=weight.dtype),
    "to a tensor": lambda unit, weight: unit.to(weight),
    "type_as": lambda unit, weight: unit.type_as(weight),
    "type": lambda unit, weight: unit.type(weight.dtype),
    "cpu": lambda unit, weight: unit.cpu(),
    "double": lambda unit, weight: unit.double(),
    "of truth values": lambda unit, weight: (unit > 0.5).to(weight.dtype),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize(("dimensions", "groups"), [(1, 2), (2, 1), (3, 4)])
def test_a_cast_to_the_parameter_s_dtype_is_read_through(move: str, dimensions: int, groups: int) -> None:
    norm = getattr(nn, f"BatchNorm{dimensions}d")
    x = torch.randn(2, 4, *(5, 6, 7)[:dimensions], dtype=torch.float64)
    model = nn.Sequential(Residual(dimensions, groups, MOVES[move], saved=True), norm(4), nn.ReLU())
    result = fused(model, x)
    assert counts(result) == (1, 0), str(repfx.report(result))
    with torch.no_grad():
        model.train()[1].eval()
        assert torch.allclose(result.train()(x), model(x))


def test_a_plain_attribute_is_moved_to_the_weight() -> None:
    model = nn.Sequential(Residual(2, 1, MOVES["to a device"], saved=False), nn.BatchNorm2d(4))
    assert counts(fused(model)) == (1, 0)


def centered_in(dtype: torch.dtype) -> Callable[[Tensor, Any], Tensor]:
    def call(x: Tensor, m: Any) -> Tensor:
        weight = m.weight.to(dtype)
        return F.conv2d(x, (weight - weight.mean((2, 3), keepdim=True)).to(m.weight.dtype))

    return call


def test_a_weight_that_is_computed_in_more_bits_is_read_through() -> None:
    model = nn.Sequential(Calling(centered_in(torch.float32), 6, 4, 3, 3), nn.BatchNorm2d(6)).bfloat16().eval()
    result = repfx.fuse(model)
    assert counts(result) == (1, 0), str(repfx.report(result))
    wide = nn.Sequential(Calling(CALLS["centered"][0], 6, 4, 3, 3), nn.BatchNorm2d(6)).double().eval()
    wide.load_state_dict(model.state_dict())
    assert_equivalent(result, wide, X, 2.0**-7)  # bfloat16 has 8 bits


NARROW: dict[str, tuple[Callable[[Tensor, Any], Tensor], str]] = {
    "rounded on the way": (centered_in(torch.bfloat16), "cast to torch.bfloat16, and its parameters are torch.float32"),
    "half": (lambda x, m: F.conv2d(x.half(), m.weight.half()).float(), "cast to torch.float16"),
    "double": (lambda x, m: F.conv2d(x.double(), m.weight.double()).float(), "cast to torch.float64"),
    "unknown": (lambda x, m: F.conv2d(x, m.weight.type("torch.FloatTensor")), "a dtype that isn't known"),
    "whole numbers": (lambda x, m: F.conv2d(x, m.taps.float()), "whole numbers alone"),
}


@pytest.mark.parametrize("case", NARROW)
def test_a_weight_of_another_dtype_stays_as_it_is(case: str) -> None:
    call, reason = NARROW[case]
    model: Any = nn.Sequential(Calling(call, 6, 4, 3, 3), nn.BatchNorm2d(6)).eval()
    model[0].register_buffer("taps", torch.ones(6, 4, 3, 3, dtype=torch.int64))
    result = repfx.fuse(model)
    assert counts(result) == (0, 1)
    assert reason in str(repfx.report(result))
    assert torch.equal(result(X.float()), model(X.float()))


@pytest.mark.parametrize(
    "cast", [lambda m: m.bias.half(), lambda m: m.bias.to(m.narrow.dtype), lambda m: m.bias.type_as(m.narrow)]
)
def test_a_scale_that_is_rounded_is_folded_as_it_is_rounded(cast: Any) -> None:
    def scaled(x: Tensor, m: Any) -> Tensor:
        result: Tensor = F.conv2d(x, m.weight) * cast(m).view(-1, 1, 1)
        return result

    model: Any = nn.Sequential(Calling(scaled, 6, 4, 3, 3), nn.BatchNorm2d(6)).double().eval()
    model[0].narrow = torch.zeros(1, dtype=torch.float16)
    result = repfx.fuse(model)
    assert counts(result) == (1, 0), str(repfx.report(result))
    assert torch.allclose(result(X), model(X), rtol=1e-9, atol=1e-9)


# ---- sizes of what is computed, and weights made by convs


def in_groups(x: Tensor, m: Any) -> Tensor:
    outer, inner = m.outer + 0, m.inner * 1
    out, between, *window = outer.size()
    through, per_group = inner.shape
    outer = outer.view(2, int(out / 2), between, *window)
    inner = inner.view(2, int(through / 2), per_group)
    weight = torch.einsum("gti,got...->goi...", inner, outer).reshape(len(m.outer.abs()), inner.size(-1), *window)
    result: Tensor = m.call(x, weight, groups=2, padding=weight.shape[-1] // 2)
    return result


def row_by_row(x: Tensor, m: Any) -> Tensor:
    outer = m.outer.flatten(2)
    first, second = (m.inner.data * 2).chunk(2)
    inner = torch.stack([first, second])
    assert isinstance(inner, Tensor)
    assert inner.ndim == 3
    rows = [row.t().mm(torch.cat([inner[index // (outer.shape[0] // 2)]])) for index, row in enumerate(outer * 1)]
    weight = torch.stack(rows).transpose(1, 2)
    result: Tensor = m.call(x, weight.reshape(weight.size(0), weight.size(1), *m.outer.shape[2:]), groups=2)
    return result


class Composed(nn.Module):
    """A 1×1 and a k×k of several groups, as one weight."""

    def __init__(self, compose: Callable[[Tensor, Any], Tensor], dimensions: int) -> None:
        super().__init__()
        self.compose, self.call = compose, getattr(F, f"conv{dimensions}d")
        self.inner, self.outer = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(6, 2, *[3] * dimensions))

    def forward(self, x: Tensor) -> Any:
        return F.conv2d(x, self.outer) if self.compose is None else self.compose(x, self)


@pytest.mark.parametrize("compose", [in_groups, row_by_row])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_sizes_of_what_is_computed_from_parameters_are_numbers(compose: Any, dimensions: int) -> None:
    norm = getattr(nn, f"BatchNorm{dimensions}d")
    x = torch.randn(2, 4, *(5, 6, 7)[:dimensions], dtype=torch.float64)
    result = fused(nn.Sequential(Composed(compose, dimensions), norm(6)), x)
    assert counts(result) == (1, 0), str(repfx.report(result))


def test_sizes_that_depend_on_the_input_or_on_a_write_are_not_known() -> None:
    def of_input(x: Tensor, m: Any) -> Tensor:
        return F.conv2d(x, m.weight * int(x.size(0) / 2))

    def written(x: Tensor, m: Any) -> Tensor:
        weight = m.weight + 0
        weight.unsqueeze_(0)
        return F.conv2d(x, weight[0] / int(weight.size(0)))

    def of_numbers(x: Tensor, m: Any) -> Tensor:
        return F.conv2d(x, m.weight / int(m.weight[m.weight > 0].numel()))

    reasons = {
        of_input: "int() of a value that depends on the input",
        written: "int() of a value that depends on the input",
        of_numbers: "code makes 'weight' a plain number by int()",
    }
    for call, reason in reasons.items():
        result = fused(nn.Sequential(Calling(call, 6, 4, 3, 3), nn.BatchNorm2d(6)))
        assert counts(result) == (0, 1)
        assert reason in str(repfx.report(result))


def convolved(x: Tensor, m: Any) -> Tensor:
    weight = m.conv(m.first.transpose(0, 1), m.second, padding=2).transpose(0, 1)
    result: Tensor = m.conv(x, weight, m.bias, padding=2, stride=(2, 1, 1)[: m.first.ndim - 2])
    return result


def convolved_by_transpose(x: Tensor, m: Any) -> Tensor:
    turned = m.first.transpose(0, 1)
    weight = m.transposed(turned, m.second.transpose(0, 1).flip([*range(2, m.first.ndim)]))
    result: Tensor = m.conv(x, weight.transpose(0, 1))
    return result


class ConvOfConvs(nn.Module):
    def __init__(self, compute: Callable[[Tensor, Any], Tensor], dimensions: int) -> None:
        super().__init__()
        self.compute, window = compute, [3] * dimensions
        self.conv, self.transposed = getattr(F, f"conv{dimensions}d"), getattr(F, f"conv_transpose{dimensions}d")
        self.first, self.second = nn.Parameter(torch.randn(8, 4, *window)), nn.Parameter(torch.randn(6, 8, *window))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Any:
        return F.conv2d(x, self.first) if self.compute is None else self.compute(x, self)


@pytest.mark.parametrize("compute", [convolved, convolved_by_transpose])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_conv_of_weights_is_no_conv_of_the_picture(compute: Any, dimensions: int) -> None:
    norm = getattr(nn, f"BatchNorm{dimensions}d")
    x = torch.randn(2, 4, *(6, 7, 8)[:dimensions], dtype=torch.float64)
    result = fused(nn.Sequential(ConvOfConvs(compute, dimensions), norm(6), nn.ReLU()), x)
    assert counts(result) == (1, 0), str(repfx.report(result))


MADE: dict[str, Callable[[Any], Tensor]] = {
    "kron": lambda m: torch.kron(m.small, m.kernel),
    "rot90": lambda m: torch.rot90(m.kernel, 1, (2, 3)) + torch.flip(m.kernel, [2]),
    "bmm": lambda m: torch.bmm(m.kernel.flatten(2), m.kernel.flatten(2).transpose(1, 2)).unsqueeze(3),
    "matmul": lambda m: (m.kernel.flatten(1).t() @ m.kernel.flatten(1)).view(4, 4, 9, 9)[:, :, ::3, ::3],
    "stack and sum": lambda m: torch.stack([m.kernel, m.kernel * 2]).sum(0) + sum([m.kernel, m.small.mean()]),
    "a conv of one weight with another": lambda m: F.conv2d(m.kernel, m.kernel.flip(2, 3), padding=1, groups=1),
}


@pytest.mark.parametrize("make", MADE)
def test_a_weight_may_be_made_by_many_functions(make: str) -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.small = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(1, 1, 2, 1))

        def forward(self, x: Tensor) -> Any:
            return F.conv2d(x, MADE[make](self))

    result = fused(nn.Sequential(Made(), nn.BatchNorm2d(4)))
    assert counts(result) == (1, 0), str(repfx.report(result))


def test_a_conv_of_weights_that_depends_on_the_input_stays() -> None:
    def scaled(x: Tensor, m: Any) -> Tensor:
        return F.conv2d(x, F.conv2d(m.first.transpose(0, 1) * x.mean(), m.second, padding=2).transpose(0, 1))

    result = fused(nn.Sequential(ConvOfConvs(scaled, 2), nn.BatchNorm2d(6)))
    assert "its weight or sizes depend on the input" in str(repfx.report(result))
    assert counts(result)[1] == 1


# ---- code that wants a plain number


def by_truth(x: Tensor, m: Any) -> Tensor:
    return F.conv2d(x, m.weight) if m.bias[0] * 2 > 100 else x


def by_float(x: Tensor, m: Any) -> Tensor:
    return F.conv2d(x, m.weight) * float(m.bias[0])


def by_int(x: Tensor, m: Any) -> Tensor:
    try:
        return F.conv2d(x, m.weight) * int(m.bias[0])
    except TypeError:
        return x


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (by_truth, "code decides by 'bias', and a graph would keep the decision"),
        (by_float, "code makes 'bias' a plain number by float(), and a graph would keep it"),
        (by_int, "code makes 'bias' a plain number by int(), and a graph would keep it"),
    ],
)
def test_a_decision_by_a_parameter_names_it(call: Any, reason: str) -> None:
    result = fused(nn.Sequential(Calling(call, 6, 4, 3, 3), nn.ReLU()))
    assert reason in str(repfx.report(result))


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


@pytest.mark.slow
def test_a_model_of_standardized_convs_is_fused_whole() -> None:
    model = timm.create_model("test_nfnet")
    assert [island.path for island in trace(model).islands] == [""]
    result = fused(model, torch.randn(2, 3, 64, 96, dtype=torch.float64))
    assert {type(module) for module in result.modules() if is_conv(module)} == {nn.Conv2d}


def test_a_computed_weight_that_is_changed_in_place_stays() -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight * 2
            weight.add_(1)
            return self.norm(F.conv2d(x, weight))  # type: ignore[no-any-return]

    model = randomize_batch_norm(Changed().double()).eval()
    result = repfx.fuse(model)
    assert_equivalent(result, model, X)
    assert any("in place" in skip.reason for skip in repfx.report(result).skipped)

"""`restore` leaves to the class what the class computes by itself: weights that load strictly compute the same there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.algebra.layers import is_batch_norm
from repfx.errors import InvalidInput, Refused
from repfx.passes.restore import Restore
from repfx.testing import assert_same_map, randomize_batch_norm
from tests.inline_net import Net

Forward = Callable[[Any, Any], Any]

CHANNELS = 6
SIZES = {1: (9,), 2: (7, 9), 3: (5, 4, 6)}


def block(forward: Forward, dimensions: int = 2, groups: int = 1, **more: Any) -> nn.Module:
    """A net: a conv and a BatchNorm `c` and `b` that `forward` calls, between two other sites."""
    conv, norm = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"BatchNorm{dimensions}d")
    own = conv(CHANNELS, CHANNELS, 3, padding=1, groups=groups, bias=False)
    inner = Net(forward, c=own, b=norm(CHANNELS), pool=POOLS[dimensions], **more)
    before, after = conv(CHANNELS, CHANNELS, 1, bias=False), conv(CHANNELS, 4, 2, bias=False)
    return nn.Sequential(before, norm(CHANNELS), nn.ReLU(), inner, nn.ReLU(), after, norm(4)).double()


def data(dimensions: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, CHANNELS, *SIZES[dimensions], generator=generator, dtype=torch.float64)


def trained(make: Callable[[], nn.Module], preset: Any = None) -> nn.Module:
    model = make() if preset is None else repfx.expand(make(), preset)
    model = randomize_batch_norm(model, seed=7).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("gain", "shift"):
                parameter.uniform_(0.5, 2)
    return model


def norms(model: nn.Module) -> int:
    return sum(map(is_batch_norm, model.modules()))


def is_batch_norm_at(model: nn.Module, path: str) -> bool:
    return any(name == path and is_batch_norm(module) for name, module in model.named_modules())


def assert_restored(make: Callable[[], nn.Module], model: nn.Module, x: Tensor) -> Any:
    """Restore a fused model, and compare with the model both the result and the plain class that loads its weights."""
    fused = repfx.fuse(model)
    assert_same_map(fused, model, x)
    restored = repfx.restore(fused)
    assert_same_map(restored, fused, x)
    plain = make().double().eval()
    plain.load_state_dict(restored.state_dict(), strict=True)
    assert_same_map(plain, model, x)
    assert repfx.report(restored).skipped == ()
    return restored


POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}

FORMS: dict[str, Forward] = {
    "residual": lambda m, x: x + m.b(m.c(x)),
    "residual behind": lambda m, x: m.b(m.c(x)) + x,
    "residual in place": lambda m, x: m.b(m.c(x)).add_(x),
    "residual before the norm": lambda m, x: m.b(m.c(x) + x),
    "two residuals": lambda m, x: x + m.b(m.c(x) - x) + x,
    "residual less": lambda m, x: m.b(m.c(x)) - x,
    "less from the residual": lambda m, x: x - m.b(m.c(x)),
    "part of the residual": lambda m, x: 0.5 * x + m.b(m.c(x)),
    "part into the residual": lambda m, x: x + m.b(m.c(x)) * 0.25,
    "pooling": lambda m, x: m.b(m.c(x)) + m.pool(x, 3, 1, 1),
    "pooling, negative": lambda m, x: 2 * (m.b(m.c(x)) - m.pool(x, 3, 1, 1)),
    "twice": lambda m, x: (lambda y: y + y)(m.b(m.c(x))),
    "thrice": lambda m, x: (lambda y: y + y + y)(m.b(m.c(x))),
    "twice, twice": lambda m, x: (lambda y: (y + y) + (y + y))(m.b(m.c(x))),
    "twice of twice": lambda m, x: (lambda y: y + y)((lambda y: y + y)(m.b(m.c(x)))),
    "conv twice": lambda m, x: m.b((lambda y: y + y)(m.c(x))),
    "factor before": lambda m, x: m.b(m.c(x * 3)),
    "factor before, divided": lambda m, x: m.b(m.c(x / 4)),
    "factor between": lambda m, x: m.b(m.c(x) * -3),
    "factor behind": lambda m, x: m.b(m.c(x)) / 0.3,
    "shift between": lambda m, x: m.b(m.c(x) + 2),
    "shift behind": lambda m, x: 1 - m.b(m.c(x)),
    "in place behind": lambda m, x: m.b(m.c(x)).mul_(0.5).sub_(2),
    "negative between": lambda m, x: m.b(-m.c(x)),
    "negative behind": lambda m, x: torch.neg(m.b(m.c(x))),
    "all of them": lambda m, x: 2 * (x - m.b(-m.c(x * 3)) - m.pool(x, 3, 1, 1)) + 1,
}


@pytest.mark.slow_one_in(8)
@pytest.mark.parametrize(
    "preset", [None, pytest.param("dbb", marks=pytest.mark.slow), pytest.param("acb", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("form", FORMS)
def test_what_has_no_key_is_left_to_the_class(form: str, preset: str | None) -> None:
    def make() -> nn.Module:
        return block(FORMS[form])

    restored = assert_restored(make, trained(make, preset), data())
    assert norms(restored) == 3


@pytest.mark.slow_one_in(4)
@pytest.mark.one_in(3)
@pytest.mark.parametrize("groups", [2, CHANNELS])
@pytest.mark.parametrize("dimensions", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["residual", "pooling", "all of them"])
def test_in_all_dimensions_and_with_groups(form: str, dimensions: int, groups: int) -> None:
    def make() -> nn.Module:
        return block(FORMS[form], dimensions, groups)

    for preset in (None, "repvgg"):
        restored = assert_restored(make, trained(make, preset), data(dimensions))
        assert restored.get_submodule("3.c").groups == groups


def test_padding_before_a_conv_with_a_residual_around_it() -> None:
    def make() -> nn.Module:
        return block(lambda m, x: x + m.b(m.d(F.pad(x, (1, 1, 1, 1)))), d=nn.Conv2d(CHANNELS, CHANNELS, 3, bias=False))

    assert assert_restored(make, trained(make), data()).get_submodule("3.d").padding == (0, 0)


def test_factors_around_a_transposed_conv() -> None:
    def make() -> nn.Module:
        up = nn.ConvTranspose2d(CHANNELS, 4, 3, stride=2, groups=2, bias=False)
        body = Net(lambda m, x: 0.5 - m.b(-m.c(x * 3)), c=up, b=nn.BatchNorm2d(4))
        return nn.Sequential(body, nn.ReLU()).double()

    assert norms(assert_restored(make, trained(make), data())) == 1


def test_factors_and_residuals_around_a_linear_layer() -> None:
    def make() -> nn.Module:
        body = Net(lambda m, x: x - 0.5 * m.b(m.c((x - 2) / 3)), c=nn.Linear(5, 5, bias=False), b=nn.BatchNorm1d(5))
        before = nn.Sequential(nn.Conv2d(CHANNELS, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(before, body, nn.ReLU()).double()

    assert norms(assert_restored(make, trained(make), data())) == 1


SCALED: dict[str, Forward] = {
    "layer scale": lambda m, x: x + m.gain.reshape(1, -1, 1, 1) * m.b(m.c(x)),
    "layer scale, computed": lambda m, x: x + m.b(m.c(x)) * torch.exp(m.gain).view(1, -1, 1, 1),
    "shift": lambda m, x: m.b(m.c(x)) + m.gain[None, :, None, None],
    "layer scale before": lambda m, x: m.b(m.c(x * m.gain.view(-1, 1, 1))),
    "both": lambda m, x: m.b(m.c(x)) * m.gain.view(-1, 1, 1) - m.shift.view(-1, 1, 1),
}


@pytest.mark.parametrize("form", SCALED)
@pytest.mark.parametrize("preset", [None, "dbb"])
def test_layer_scales_and_shifts_come_back(form: str, preset: str | None) -> None:
    def make() -> nn.Module:
        vectors: dict[str, Any] = {name: nn.Parameter(torch.ones(CHANNELS)) for name in ("gain", "shift")}
        return block(SCALED[form], **vectors)

    model = trained(make, preset)
    restored = assert_restored(make, model, data())
    assert torch.equal(restored.get_parameter("3.gain"), model.get_parameter("3.gain"))
    restored.train()(data()).square().sum().backward()
    assert restored.get_parameter("3.gain").grad is not None


@pytest.mark.parametrize("persistent", [True, False])
def test_constants_inside_a_net_come_back_as_they_were(persistent: bool) -> None:
    def make() -> nn.Module:
        model: Any = block(
            lambda m, x: m.b(m.d((x - m.mean) / m.deviation)), d=nn.Conv2d(CHANNELS, CHANNELS, 2, bias=False)
        )
        del model[3].c
        generator = torch.Generator().manual_seed(1)
        for name in ("mean", "deviation"):
            values = torch.rand(CHANNELS, 1, 1, generator=generator, dtype=torch.float64) + 0.5
            model[3].register_buffer(name, values, persistent=persistent)
        net: nn.Module = model
        return net

    restored = assert_restored(make, trained(make), data())
    assert ("3.mean" in restored.state_dict()) is persistent


IN_FRONT: dict[str, Forward] = {
    "before a conv": lambda m, x: m.c(m.b(x)),
    "before a conv and a BatchNorm": lambda m, x: 3 - m.e(m.c(m.b(x))),
    "before a conv with all around": lambda m, x: 2 * (x - m.c(m.b(x) * 3)) + 1,
}


@pytest.mark.parametrize("form", IN_FRONT)
@pytest.mark.parametrize("preset", [None, "repvgg"])
def test_a_batch_norm_in_front_of_a_conv_comes_back_as_it_was(form: str, preset: str | None) -> None:
    def make() -> nn.Module:
        model = block(IN_FRONT[form], e=nn.BatchNorm2d(CHANNELS))
        own = nn.Conv2d(CHANNELS, CHANNELS, 3)
        model.get_submodule("3").c = own if "all" not in form else nn.Conv2d(CHANNELS, CHANNELS, 1)
        return model.double()

    model = trained(make, preset)
    assert norms(repfx.fuse(model)) <= 1
    restored = assert_restored(make, model, data())
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(restored.get_submodule("3.b"), name), getattr(model.get_submodule("3.b"), name))
    assert "3.b" in [source for edit in repfx.report(restored).applied for source in edit.sources]
    assert not is_batch_norm_at(repfx.restore(repfx.fuse(model), sites="0"), "3.b")


def test_only_a_batch_norm_in_front() -> None:
    def make() -> nn.Module:
        linear = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(4 * 5 * 7), nn.Linear(4 * 5 * 7, 3))
        return nn.Sequential(nn.Conv2d(CHANNELS, 4, 3), linear).double()

    assert norms(assert_restored(make, trained(make), data())) == 1


@pytest.mark.slow
def test_several_in_a_row_and_blocks_in_blocks() -> None:
    def make() -> nn.Module:
        bodies = [block(FORMS[form])[3] for form in ("residual", "all of them", "pooling", "factor before")]  # type: ignore[index]
        return nn.Sequential(*(part for body in bodies for part in (body, nn.ReLU()))).double()

    for preset in (None, "dbb", ["identity", "1x1"]):
        assert_restored(make, trained(make, preset), data())
    nested = randomize_batch_norm(repfx.expand(trained(make, "repvgg"), "acb"), seed=8).eval()
    restored = assert_restored(make, nested, data())
    assert norms(restored) == 4


def test_a_conv_without_a_batch_norm_is_taken_apart_too() -> None:
    """Otherwise its key would be there, and hold what the class adds by itself."""

    def make() -> nn.Module:
        return block(lambda m, x: m.b(m.c(x)).relu() - m.d(x * 3), d=nn.Conv2d(CHANNELS, CHANNELS, 1))

    model = trained(make)
    restored = assert_restored(make, model, data())
    assert "3.d" in [edit.path for edit in repfx.report(restored).applied]
    named = repfx.restore(repfx.fuse(model), sites=["0", "3.c", "5"])
    plain = make().eval()
    plain.load_state_dict(named.state_dict(), strict=True)
    assert_same_map(plain, model, data())


def test_a_bias_that_only_held_a_shift_goes() -> None:
    def make() -> nn.Module:
        return block(lambda m, x: m.b(m.c(x)).relu() + m.d(x).add(3).relu(), d=nn.Conv2d(6, 6, 1, bias=False))

    restored = assert_restored(make, trained(make), data())
    assert restored.get_submodule("3.d").bias is None


@pytest.mark.slow
def test_in_float32() -> None:
    def make() -> nn.Module:
        return block(FORMS["all of them"])

    model = trained(make, "dbb").float()
    restored = repfx.restore(repfx.fuse(model))
    plain = make().float().eval()
    plain.load_state_dict(restored.state_dict(), strict=True)
    assert_same_map(plain, model, data().float(), 1e-5)  # float32 weights, rounded once by each verb


@pytest.mark.slow
def test_trained_after_fusing() -> None:
    """The residual is taken out of the weights as they are now."""

    def make() -> nn.Module:
        return block(FORMS["residual"])

    fused = repfx.fuse(trained(make, "dbb"))
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    restored = repfx.restore(fused)
    assert_same_map(restored, fused, data())
    plain = make().eval()
    plain.load_state_dict(restored.state_dict(), strict=True)
    assert_same_map(plain, fused, data())


def test_statistics_are_those_of_the_batch_norm_itself() -> None:
    """A residual outside a BatchNorm has no part in its statistics."""

    def make() -> nn.Module:
        return block(FORMS["all of them"])

    model = trained(make)
    fused = repfx.fuse(model)
    restored: Any = repfx.restore(fused)
    expected: Any = model
    norm, before = restored.get_submodule("3.b"), expected[3].b
    share = before.running_var / (before.running_var + before.eps)
    torch.testing.assert_close(norm.running_var, before.weight.square() * share)
    torch.testing.assert_close(norm.bias, before.bias)
    measured = repfx.restore(fused, calibrate=[data()])
    assert_same_map(measured, fused, data())
    assert_same_map(measured.train(), fused, data())


def test_what_was_around_survives_copying_pickling_and_casts() -> None:
    def make() -> nn.Module:
        return block(SCALED["layer scale"], gain=nn.Parameter(torch.ones(CHANNELS)))

    model = trained(make)
    fused = repfx.fuse(model)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused).float().double()):
        plain = make().eval()
        plain.load_state_dict(repfx.restore(twin).state_dict(), strict=True)
        assert_same_map(plain, model, data(), 1e-6)
    half = repfx.restore(copy.deepcopy(fused).half())
    assert half.get_parameter("3.gain").dtype == torch.float16


def test_inside_another_model() -> None:
    def make() -> nn.Module:
        return block(SCALED["layer scale"], gain=nn.Parameter(torch.ones(CHANNELS)))

    outer = nn.ModuleDict({"backbone": trained(make)})
    fused = nn.ModuleDict({"backbone": repfx.fuse(outer["backbone"])})
    plain = nn.ModuleDict({"backbone": make()}).eval()
    plain.load_state_dict(repfx.restore(fused).state_dict(), strict=True)
    assert_same_map(plain["backbone"], outer["backbone"], data())


# ---- what can't be taken apart


class Standardized(nn.Conv2d):
    """A conv that computes its weight in forward, from the key that the merged weight would have."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight * 3, self.bias, self.stride, self.padding)


STANDARDIZED: dict[bool, Forward] = {
    True: lambda m, x: m.b(m.d(x)) + m.c(x).relu(),
    False: lambda m, x: m.b(m.c(x)) + m.d(x).relu(),
}


class DirectlyCalled(nn.Conv2d):
    """A conv with a forward of its own that uses its weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def test_a_conv_that_uses_its_weight_as_it_is() -> None:
    def make() -> nn.Module:
        return block(lambda m, x: x + m.b(m.d(x)) + m.c(x).relu(), d=DirectlyCalled(CHANNELS, CHANNELS, 3))

    assert_restored(make, trained(make), data())


@pytest.mark.parametrize("normed", [True, False])
def test_a_conv_that_computes_its_weight_does_not_load(normed: bool) -> None:
    def make() -> nn.Module:
        return block(STANDARDIZED[normed], d=Standardized(CHANNELS, CHANNELS, 3, padding=1))

    fused = repfx.fuse(trained(make))
    restored = repfx.restore(fused)
    assert_same_map(restored, fused, data())
    (skip,) = repfx.report(restored).skipped
    assert (skip.path, "its weight is computed in forward" in skip.reason) == ("3.d", True)
    with pytest.raises(RuntimeError, match=r"3\.d"):
        make().load_state_dict(restored.state_dict(), strict=True)
    with pytest.raises(Refused, match="computed in forward"):
        repfx.restore(fused, strict=True)


def test_a_factor_of_zero_can_not_be_taken_out() -> None:
    def make() -> nn.Module:
        return block(SCALED["layer scale"], gain=nn.Parameter(torch.ones(CHANNELS)))

    model = trained(make)
    with torch.no_grad():
        model.get_parameter("3.gain")[2] = 0
    fused = repfx.fuse(model)
    restored = repfx.restore(fused)
    assert_same_map(restored, fused, data())
    assert "a factor of zero" in str(repfx.report(restored))
    with pytest.raises(RuntimeError, match=r"3\.b"):
        make().load_state_dict(restored.state_dict(), strict=True)


def test_in_place_only_a_batch_norm_is_put_back() -> None:
    fused = repfx.fuse(trained(lambda: block(FORMS["residual"])))
    with pytest.raises(InvalidInput, match=r"'3\.c' has absorbed more than a BatchNorm"):
        Restore.apply(fused, [Restore("3.c")], None)


@pytest.mark.parametrize("form", ["residual", "negative between"])
def test_channels_pruned_after_fusing(form: str) -> None:
    fused: Any = repfx.fuse(trained(lambda: block(FORMS[form])))
    pruned = fused.get_submodule("5")
    pruned.weight, pruned.bias = nn.Parameter(pruned.weight[:3]), nn.Parameter(pruned.bias[:3])
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(InvalidInput, match=r"'5' gives out 3 channels, but the BatchNorm .* had 4\. Restore"):
        repfx.restore(fused)
    assert all(torch.equal(before[name], tensor) for name, tensor in fused.state_dict().items())
    assert norms(repfx.restore(fused, sites=["0", "3.c"])) == 2


class Difference(nn.Module):
    """A difference of two convs times a parameter, fused into one conv."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, (1, 2)), nn.Conv2d(4, 4, (1, 2))
        self.factor = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        difference: Tensor = self.first(x) - self.second(x)
        return difference * self.factor


def test_a_factor_that_is_a_parameter_can_be_copied() -> None:
    fused = repfx.fuse(Difference().double().eval())
    repfx.check_equivalent(copy.deepcopy(fused), fused, torch.randn(2, 4, 5, 7, dtype=torch.float64))

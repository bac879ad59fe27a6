"""`drop` removes one branch and keeps the function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

import repfx
from repfx.blocks.presets import PRESETS
from repfx.errors import InvalidInput, UnknownName
from repfx.passes.fuse import Fuse
from repfx.records.journal import apply
from repfx.testing import assert_same_map, randomize_batch_norm
from tests.small_net import SmallNet, batch, small_net


@pytest.mark.one_in(4)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_branch_in_turn_until_the_plain_model_is_back(preset: str) -> None:
    model = small_net()
    plain_text = str(model)
    expanded = randomize_batch_norm(repfx.expand(model, preset), seed=8).eval()
    reference = copy.deepcopy(expanded)
    for site in repfx.sites(expanded):
        for branch in site.branches:
            assert repfx.drop(expanded, site.path, branch) is expanded
            assert_same_map(expanded, reference, batch())
    assert str(expanded) == plain_text
    SmallNet().double().load_state_dict(expanded.state_dict(), strict=True)


FORMS: list[dict[str, Any]] = [
    {"padding": 2, "dilation": 2},
    {"padding": (1, 2), "stride": (2, 1)},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "circular", "dilation": (1, 2)},
    {"padding": 1, "groups": 4},
]


@pytest.mark.parametrize("normalised", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("preset", ["dyrep", "qarepvgg"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_conv_again_keeps_its_form_and_its_bias_is_saved(form: dict[str, Any], preset: str, normalised: bool) -> None:
    """DyRep's public code loses dilation and padding mode here, and loses the bias when a run resumes."""
    plain = nn.Sequential(nn.Conv2d(4, 4, 3, **form), *[nn.BatchNorm2d(4)] * normalised).double()
    expanded = randomize_batch_norm(repfx.expand(randomize_batch_norm(plain), preset), seed=3).eval()
    reference, x = copy.deepcopy(expanded), torch.randn(2, 4, 9, 10, dtype=torch.float64)
    for branch in repfx.sites(expanded)["0"].branches:
        repfx.drop(expanded, "0", branch)
    assert str(expanded) == str(plain)
    plain.load_state_dict(expanded.state_dict(), strict=True)
    assert_same_map(plain.eval(), reference, x)


def test_what_stays_are_the_same_parameters() -> None:
    model: Any = randomize_batch_norm(repfx.expand(small_net(), "dbb"), seed=9)
    weight, gamma = model.stem.conv.weight, model.stem.norm.weight
    repfx.drop(model, "stem", "1x1")
    assert model.stem.conv.weight is weight
    assert model.stem.norm.weight is gamma
    assert model.stem.branches.keys() == {"1x1-kxk", "1x1-avg"}


def test_a_zero_gamma_of_the_origin_divides_nothing() -> None:
    model: Any = randomize_batch_norm(repfx.expand(small_net(), "dbb"), seed=10).eval()
    with torch.no_grad():
        model.stem.norm.weight.zero_()
    reference = copy.deepcopy(model)
    assert_same_map(repfx.drop(model, "stem", "1x1-avg"), reference, batch())


@pytest.mark.slow
def test_in_training_mode_a_branch_that_adds_nothing_leaves_nothing() -> None:
    """Training mode is kept, too, if the branch has γ = β = 0 and the statistics are those of the data."""
    model: Any = repfx.expand(small_net(), {"stem": "acb"}).train()
    data = batch(64)
    for _ in range(400):
        model(data)
    reference = copy.deepcopy(model)
    # running variance is unbiased, batch variance biased: they differ by 1 in 64·99 positions
    assert_same_map(repfx.drop(model, "stem", "1xk").train(), reference, data, 1e-3)


def test_bad_names() -> None:
    model = repfx.expand(small_net(), {"stem": "acb"})
    before = str(model)
    with pytest.raises(UnknownName, match="no block at 'sten'; did you mean 'stem'"):
        repfx.drop(model, "sten", "1xk")
    with pytest.raises(UnknownName, match="no branch '1x1'"):
        repfx.drop(model, "stem", "1x1")
    with pytest.raises(InvalidInput, match="has no blocks"):
        repfx.drop(small_net(), "stem", "1xk")
    assert str(model) == before


def test_a_batch_norm_without_gamma_can_t_absorb() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, affine=False)).double()
    expanded = repfx.expand(model, "acb")
    before = str(expanded)
    with pytest.raises(InvalidInput, match="no γ"):
        repfx.drop(expanded, "0", "1xk")
    assert str(expanded) == before


def test_a_batch_norm_that_also_activates_returns_whole() -> None:
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), layers.BatchNormAct2d(6, act_layer=nn.SiLU)).double()
    randomize_batch_norm(model)
    expanded: Any = repfx.expand(model, ["1x1"])
    repfx.drop(expanded, "0", "1x1")
    assert str(expanded) == str(model)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    assert_same_map(expanded.eval(), model.eval(), x)
    expanded[1].act.register_forward_hook(lambda *_: torch.zeros(()).double())
    assert float(expanded(x)) == 0, "the activation is the module's own again"


class Around(nn.Module):
    """A module that does more than the conv in it."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y * 2


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def positive(norm: nn.Module, name: str) -> None:
    register_parametrization(norm, name, Positive())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda origin: weight_norm(origin.conv), "computes weights by a parametrization"),
        (lambda origin: origin.add_module("conv", Around(origin.conv)), "in place of its conv there is a Around"),
        (lambda origin: positive(origin.norm, "weight"), "its BatchNorm computes γ or β by a parametrization"),
        (lambda origin: positive(origin.norm, "bias"), "its BatchNorm computes γ or β by a parametrization"),
    ],
)
def test_an_origin_that_can_t_be_written_into(change: Callable[[Any], object], message: str) -> None:
    model: Any = repfx.expand(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), "acb").eval()
    change(model[0].origin)
    x = torch.randn(2, 4, 6, 7)
    expected = model(x)
    with pytest.raises(InvalidInput, match=message):
        repfx.drop(model, "0", "1xk")
    assert torch.equal(model(x), expected)


def two_sites(dimensions: int = 2) -> Any:
    """Two convs, each with a BatchNorm."""
    conv, norm = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"BatchNorm{dimensions}d")
    model = nn.Sequential(conv(4, 4, 3, padding=1), norm(4), nn.ReLU(), conv(4, 4, 3, padding=1), norm(4))
    return randomize_batch_norm(model.double())


def tie(name: str) -> Callable[[Any], None]:
    def tied(model: Any) -> None:
        setattr(model[4], name, getattr(model[1], name))

    return tied


# numbers of a BatchNorm that can't be written, or that another module reads, too
NOT_WRITABLE: dict[str, Callable[[Any], None]] = {
    "γ by a parametrization": lambda model: positive(model[1], "weight"),
    "β by a parametrization": lambda model: positive(model[1], "bias"),
    **{f"{name} of two BatchNorms": tie(name) for name in ("weight", "bias", "running_mean", "running_var")},
}


@pytest.mark.slow_one_in(6)
@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "dimensions", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("preset", ["repvgg", "qarepvgg"])
@pytest.mark.parametrize("name", NOT_WRITABLE)
def test_a_norm_that_can_t_be_written_stays_behind_the_block(name: str, preset: str, dimensions: int) -> None:
    model = two_sites(dimensions)
    NOT_WRITABLE[name](model)
    x = torch.randn(2, 4, *(5, 6, 7)[:dimensions], dtype=torch.float64)
    expanded = repfx.expand(model, preset)
    for training in (True, False):
        assert_same_map(copy.deepcopy(expanded).train(training), copy.deepcopy(model).train(training), x)
    expanded = randomize_batch_norm(expanded, seed=5).eval()
    reference = copy.deepcopy(expanded)
    for site in repfx.sites(expanded):
        for branch in site.branches:
            repfx.drop(expanded, site.path, branch)
            assert_same_map(expanded, reference, x)
    assert_same_map(repfx.fuse(reference), reference, x)
    apply(reference, [Fuse("0"), Fuse("3")], None)
    assert_same_map(reference, expanded, x)

"""A fused model says why each remaining conv and BatchNorm is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth
from typer.testing import CliRunner

import repfx
from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.commands import app
from tests.inline_net import fused_exactly, image, norms, ready


def reasons(model: nn.Module) -> dict[str, str]:
    return {skip.path: skip.reason for skip in repfx.report(repfx.fuse(model.eval())).stays}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(self.conv(x)))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.spare = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x)) if x.sum() > 0 else x


class Around(nn.Module):
    """Untraceable code in the middle of a model that is traced around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.unused = nn.Conv2d(3, 3, 1), Branching(), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.stem(x)).relu()


CASES: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "no rule": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        {
            "0": "no rule: GroupNorm follows",
            "2": "no rule: GroupNorm comes before it",
            "4": "no rule: the output follows",
        },
    ),
    "called twice": (
        Twice(),
        {
            "conv": "it is called 2 times; a change would change every call",
            "norm": "no rule: Conv2d comes before it",
        },
    ),
    "borders": (
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 2, 3, padding=1)),
        {"0": "zero", "1": "zero"},
    ),
    "dearer": (
        nn.Sequential(nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)),
        {
            "0": "the merged conv would have 64 weights, the convs it replaces have 32 (merge_sequential)",
            "1": "would have 64",
        },
    ),
    "around code that can't be traced": (
        Around(),
        {
            "stem": "no rule: Branching follows",
            "inner.conv": "what calls it can't be traced",
            "inner.norm": "what calls it can't be traced",
            "inner.spare": "what calls it can't be traced",
        },
    ),
    "alone": (Branching(), dict.fromkeys(("conv", "norm", "spare"), "what calls it can't be traced")),
}


@pytest.mark.parametrize("case", CASES)
def test_the_reason_is_given(case: str) -> None:
    model, expected = CASES[case]
    found = reasons(model)
    for path, part in expected.items():
        assert part in found[path], found
    for path, reason in found.items():
        assert path in expected or reason == "nothing calls it"


@pytest.mark.parametrize(
    "name", [pytest.param("densenet121", marks=pytest.mark.slow), "googlenet", "fasterrcnn_mobilenet_v3_large_fpn"]
)
def test_nothing_that_stays_is_left_out(name: str) -> None:
    options = {"weights_backbone": None} if "rcnn" in name else {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    fused = repfx.fuse(model)
    layers = {path for path, module in fused.named_modules() if is_conv(module) or is_batch_norm(module)}
    assert {skip.path for skip in repfx.report(fused).stays} == layers


@pytest.mark.slow
def test_inspect_says_it() -> None:
    found = CliRunner().invoke(app, ["inspect", "torchvision:densenet121", "--fused"])
    assert found.exit_code == 0
    assert "features.conv0: no rule: ReLU follows" in found.output
    assert "features.denseblock1.denselayer1.norm1: no rule: cat comes before it" in found.output.splitlines()


def test_two_questions_at_once_are_refused() -> None:
    found = CliRunner().invoke(app, ["inspect", "torchvision:densenet121", "--fused", "--spec", "dbb"])
    assert found.exit_code != 0


class Dropping(nn.Module):
    """A conv and its BatchNorm, dropped in training mode, beside the input; a BatchNorm behind the sum, with another term in it."""

    def __init__(self, drop: nn.Module, dimensions: int = 2) -> None:
        super().__init__()
        conv, norm = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"BatchNorm{dimensions}d")
        self.conv, self.inner, self.norm, self.drop = conv(4, 4, 3, padding=1), norm(4), norm(4), drop

    def forward(self, x: Tensor) -> Any:
        return self.norm(x * 2 + self.drop(self.inner(self.conv(x))) - x)


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("drop", [nn.Dropout(0.4), DropPath(0.4), StochasticDepth(0.4, "row")])
def test_a_drop_in_the_sum_before_a_norm_is_named(drop: nn.Module, dimensions: int) -> None:
    model = ready(Dropping(drop, dimensions))
    x = image(3, 4, *(9, 7)[:dimensions])
    fused = fused_exactly(model, x)
    assert norms(fused) == ["norm"]
    reason = "no rule: 'drop' drops a term of the sum before it while the model trains, so the sum is no conv"
    assert reasons(model)["norm"] == reason
    # the sum that trains is another map whenever something is dropped, and the map that is fused when nothing is
    fused.norm.momentum = 0
    norm, others = fused.norm.eval(), [each for each in fused.modules() if each is not fused.norm]
    seen = {}
    for seed in range(40):
        torch.manual_seed(seed)
        for each in others:
            each.training = True
        dropped = fused.get_submodule("drop")(torch.ones(3, 4, *(9, 7)[:dimensions], dtype=torch.float64))
        torch.manual_seed(seed)
        expected = norm(x + dropped * fused.get_submodule("conv")(x))
        seen[bool((dropped == 0).any())] = float((fused(x) - expected).abs().max())
    assert all(error < 1e-9 for error in seen.values())
    assert True in seen

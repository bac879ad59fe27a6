"""Feature extractors of torchvision and timm: graphs of two modes, and hooks that collect what forward returns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import repfx
from repfx.algebra.layers import is_batch_norm
from repfx.errors import InvalidInput
from repfx.measuring.cost import count_macs
from repfx.passes.calibrate import calibrate
from repfx.schedules.fixed import Fixed
from tests.inline_net import norms, ready, same_state
from tests.random_numbers import numbers_from


class Two(nn.Module):
    """Two stages; what stands between them depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.deep, self.norm2 = nn.Conv2d(6, 5, (3, 1)), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.stem(x)).relu()
        return self.norm2(self.deep(self.between(x)))

    def between(self, x: Tensor) -> Any:
        return x


class Differs(Two):
    def between(self, x: Tensor) -> Any:
        return x * 3 if self.training else x.abs() + 1


def extractor(model: nn.Module) -> Any:
    return create_feature_extractor(model, ["norm", "norm2"], suppress_diff_warning=True)


class Around(nn.Module):
    """An extractor as a part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Any:
        return list(self.part(x).values())


def of_timm(cls: str) -> nn.Module:
    found: nn.Module = timm.create_model("resnet10t", features_only=True, feature_cls=cls, out_indices=(1, 3))
    return found


EXTRACTORS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: extractor(Two()),
    "torchvision, as a part": lambda: Around(extractor(Two())),
    "torchvision, with two graphs": lambda: extractor(Differs()),
    "torchvision, with two graphs, as a part": lambda: Around(extractor(Differs())),
    "torchvision, resnet18": lambda: create_feature_extractor(torchvision.models.resnet18(), ["layer1", "layer3"]),
    "timm, fx": lambda: of_timm("fx"),
    "timm, hook": lambda: of_timm("hook"),
}


def restored(fused: nn.Module) -> Any:
    try:
        return repfx.restore(fused)
    except InvalidInput:  # nothing was fused
        return fused


VERBS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fuse": repfx.fuse,
    "expand": lambda model: repfx.expand(model, "acb"),
    "expand, fuse": lambda model: repfx.fuse(repfx.expand(model, "acb")),
    "fuse, restore": lambda model: restored(repfx.fuse(model)),
    "squeeze": lambda model: repfx.squeeze(repfx.expand(model, "acb"), statistics="frozen"),
}


def image() -> Tensor:
    return torch.randn(2, 3, 33, 34, dtype=torch.float64, generator=numbers_from(1))


def flat(output: Any) -> list[Tensor]:
    return list(output.values() if isinstance(output, dict) else output)


@torch.no_grad()
def features(model: nn.Module, *, training: bool = False) -> list[Tensor]:
    """The features in one mode, with BatchNorms in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    for norm in filter(is_batch_norm, model.modules()):
        norm.eval()
    found = flat(model(image()))
    for module, mode in reversed(modes):
        if module.training != mode:
            module.train(mode)
    return found


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected):
        assert float((one - other).abs().max()) <= 1e-9 * float(other.abs().max())


@pytest.mark.slow_one_in(6)
@pytest.mark.one_in(4)
@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", EXTRACTORS)
def test_every_verb_keeps_the_features_and_the_modes(name: str, verb: str, training: bool) -> None:
    model = ready(EXTRACTORS[name]()).train(training)
    before = copy.deepcopy(model.state_dict())
    after = VERBS[verb](model)
    assert same_state(model.state_dict(), before)
    for each in (model, after):
        assert {module.training for module in each.modules() if not is_batch_norm(module)} == {training}
    for mode in (training, not training, training):
        assert_same(features(after, training=mode), features(model, training=mode))


@pytest.mark.parametrize("name", [name for name in EXTRACTORS if "two graphs" not in name])
def test_what_can_be_fused_is(name: str) -> None:
    fused = repfx.fuse(ready(EXTRACTORS[name]()))
    hooked = {path for path, module in fused.named_modules() if module._forward_hooks}
    assert {path for path in norms(fused) if path not in hooked} == set()


@pytest.mark.slow_one_in(3)
@pytest.mark.one_in(3)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", EXTRACTORS)
def test_notes_and_checkpoints(name: str, training: bool, tmp_path: Path) -> None:
    model = ready(EXTRACTORS[name]()).train(training)
    base = copy.deepcopy(model).train(training)
    assert len(repfx.sites(model)) > 1
    assert repfx.journal(model) == ()
    assert repfx.report(model).applied == ()
    assert repfx.expand(model, "acb", inplace=True) is model
    assert len(repfx.journal(model)) == len(repfx.report(model).applied) > 0
    repfx.save(tmp_path / "run.ckpt", model)
    again = repfx.load(tmp_path / "run.ckpt", base)
    assert repfx.journal(again) == repfx.journal(model)
    assert_same(features(again), features(model))


@pytest.mark.parametrize("name", EXTRACTORS)
def test_a_driver_takes_them(name: str) -> None:
    model = ready(EXTRACTORS[name]()).train()
    expected = features(model)
    repfx.Driver(model, torch.optim.SGD(model.parameters(), 0.1), Fixed("acb", preserve=True))
    assert len(repfx.journal(model)) > 0
    assert_same(features(model), expected)


@pytest.mark.parametrize("training", [True, False])
def test_what_runs_in_eval_mode_for_a_while_has_its_graph_back(training: bool) -> None:
    model = ready(extractor(Differs())).train(training)
    expected = model.code
    count_macs(model, image())
    assert model.code == expected
    calibrate(model, [image()])
    assert model.code == expected

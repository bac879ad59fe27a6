"""Layers that are linear only at one setting, which training may change, are no part of a squeezed region."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.drop import DropPath
from torch import nn

import repfx
from repfx.rewriting.squeezed_regions import regions_of
from repfx.testing import randomize_batch_norm

SETTINGS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object]]] = {
    "slope": (lambda: nn.LeakyReLU(1.0), lambda layer: setattr(layer, "negative_slope", 0.2)),
    "slopes": (lambda: nn.PReLU(init=1.0), lambda layer: layer.weight.data.fill_(0.2)),
    "dropout": (lambda: nn.Dropout(0.0), lambda layer: setattr(layer, "p", 0.5)),
    "drop path": (lambda: DropPath(0.0), lambda layer: setattr(layer, "drop_prob", 0.5)),
    "running statistics": (
        lambda: nn.InstanceNorm2d(4, track_running_stats=True),
        lambda layer: layer.running_mean.fill_(3),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_squeezed_model_follows_a_setting_that_changes(name: str) -> None:
    make, change = SETTINGS[name]
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    layers = (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), make(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model: Any = randomize_batch_norm(nn.Sequential(*layers)).double().eval()
    own: Any = copy.deepcopy(model)
    repfx.squeeze(model, statistics="frozen")
    assert sorted(regions_of(model).values()) == [("0", "1"), ("3", "4")]
    for each in (own, model):
        change(each[2])
        each[2].train()
    outputs = []
    for each in (own, model):
        torch.manual_seed(0)
        outputs.append(each(x))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_fuse_goes_by_the_setting_of_the_moment(name: str) -> None:
    make, change = SETTINGS[name]
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 3), make(), nn.Conv2d(4, 4, 1)).double().eval()
    for _ in range(2):
        assert torch.allclose(repfx.fuse(model)(x), model(x), atol=1e-10)
        change(model[1])

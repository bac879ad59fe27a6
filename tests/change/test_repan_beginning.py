"""RepAn begins with a net of blocks, as Algorithm 1 does, and folds them where their statistics have settled, too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import repfx
from repfx.errors import InvalidInput
from repfx.passes.calibrate import calibrate
from repfx.testing import assert_same_map, randomize_batch_norm, relative_error
from tests.random_numbers import numbers_from

X = torch.randn(6, 3, 7, 9, dtype=torch.float64, generator=numbers_from(0))


def pretrained() -> Any:
    """A net of blocks whose running statistics are far from those of the data."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)]
    return randomize_batch_norm(repfx.expand(nn.Sequential(*layers).double(), "acb"), 3)


def folded(model: Any, *, settle: bool) -> Any:
    """Let RepAn begin: it folds the blocks and attaches new branches, which add nothing yet."""
    begun = copy.deepcopy(model)
    repan = repfx.schedules.RepAn(cycles=1, epochs=2, warm_up=1, settle=settle)
    repfx.Driver(begun, torch.optim.SGD(begun.parameters(), 0.1), repan, calibrate=[X])
    kinds = [action.kind for action in repfx.journal(begun)[len(repfx.journal(model)) :]]
    assert kinds == ["calibrate"] * settle + ["fuse"] * 2 + ["restore"] * 2 + ["expand"] * 2
    return begun


def moved(begun: Any, model: Any, *, training: bool) -> float:
    return relative_error(copy.deepcopy(begun).train(training)(X), copy.deepcopy(model).train(training)(X))


def test_a_fold_moves_training_mode_where_statistics_lag_behind() -> None:
    model = pretrained()
    begun = folded(model, settle=False)
    assert moved(begun, model, training=False) < 1e-9
    assert moved(begun, model, training=True) > 0.05


def test_settled_first_neither_mode_moves() -> None:
    model = pretrained()
    begun = folded(model, settle=True)
    settled = calibrate(copy.deepcopy(model), [X])
    assert_same_map(copy.deepcopy(begun).eval(), settled.eval(), X)
    assert moved(begun, model, training=True) < 1e-4
    assert moved(begun, model, training=False) > 0.05, "settling is what moves eval mode"


def test_settling_needs_data() -> None:
    model = pretrained()
    with pytest.raises(InvalidInput, match="give `calibrate`"):
        repfx.Driver(model, torch.optim.SGD(model.parameters(), 0.1), repfx.schedules.RepAn(settle=True))

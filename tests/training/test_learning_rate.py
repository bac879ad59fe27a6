"""The learning rate step by step, and which parameters an optimizer gets in which group."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from repfx.training.learning_rate import SHAPES, share_of_rate
from repfx.training.optimizers import make_optimizer
from repfx.training.recipe import Recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize("warm_up", [0, 1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rate_rises_and_falls_by_step(shape: str, warm_up: int) -> None:
    """It reaches its greatest value in the last step of the warm-up, and begins to fall from there."""
    shares = [share_of_rate(step, 12, shape=shape, warm_up=warm_up) for step in range(12)]
    assert shares[:warm_up] == [(step + 1) / warm_up for step in range(warm_up)]
    for step in range(warm_up, 12):
        done = (step - warm_up) / (12 - warm_up)
        expected = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[shape]
        assert shares[step] == pytest.approx(expected)


def test_a_fifth_of_the_steps_is_the_warm_up_unless_one_is_given() -> None:
    assert [share_of_rate(step, 10) for step in (0, 1, 2)] == [0.5, 1, 1]


def test_each_milestone_lowers_the_rate_at_its_step() -> None:
    options = {"shape": "constant", "warm_up": 0, "steps_down": [3, 5], "factor": 0.5}
    shares = [share_of_rate(step, 8, **options) for step in range(8)]  # type: ignore[arg-type]
    assert shares == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize(("decay_vectors", "decays"), [(True, {0.3}), (False, {0.0})])
def test_vectors_decay_only_if_that_is_asked_for(decay_vectors: bool, decays: set[float]) -> None:
    optimizer = make_optimizer(net(), Recipe(weight_decay=0.3, decay_vectors=decay_vectors), CPU)
    found = {each.ndim > 1: set[float]() for each in optimizer.param_groups[0]["params"]} | {True: set(), False: set()}
    for group in optimizer.param_groups:
        for each in group["params"]:
            found[each.ndim > 1].add(group["weight_decay"])
    assert found == {True: {0.3}, False: decays}


@pytest.mark.parametrize("decay_vectors", [True, False])
def test_what_is_frozen_is_in_no_group(decay_vectors: bool) -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model, Recipe(decay_vectors=decay_vectors), CPU)
    given = {each for group in optimizer.param_groups for each in group["params"]}
    assert given == {each for each in model.parameters() if each.requires_grad}

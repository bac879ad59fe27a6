"""Optimizers and learning rates of timm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from repfx.errors import Interrupted, InvalidInput
from repfx.training.learning_rate import curve_of, share_of_rate
from repfx.training.loop import train
from repfx.training.optimizers import make_optimizer
from repfx.training.recipe import Recipe
from tests.tiny import net
from tests.training.test_training import LOOKS_AT_ALL, pictures, trained


def test_the_cosine_of_timm_is_ours_after_the_warm_up() -> None:
    """timm's own cosine counts the steps of the warm-up, and ours begins after it."""
    theirs = curve_of("timm:cosine", 30, warm_up=0)
    assert [theirs(done) for done in range(30)] == pytest.approx(
        [share_of_rate(done, 30, warm_up=0) for done in range(30)]
    )
    later = curve_of("timm:cosine", 30, warm_up=10)
    assert [later(done) for done in (20, 5, 29)] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * 20 / 30)), 0.500005, 0.5 * (1 + math.cos(math.pi * 29 / 30))]
    )


def test_the_steps_of_timm_are_the_recipe_s() -> None:
    """timm counts from 1, so that it goes down a step earlier."""
    curve = curve_of("timm:multistep", 10, warm_up=0, steps_down=[3, 6], factor=0.5)
    assert [curve(done) for done in (0, 1, 2, 4, 5, 9)] == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25])
    assert curve_of("timm:none", 10)(7) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "timm:lambb"}, "no optimizer of timm 'lambb'; did you mean 'lamb'?"),
        ({"optimizer": "timm:lamb", "optimizer_options": {"beta": 3}}, "timm:lamb can't be made with"),
        ({"optimizer": "timm:lamb", "optimizer_options": {"lr": 3}}, "set learning_rate instead"),
        ({"optimizer": "timm:adahessian"}, "timm:adahessian fails in a trial step"),
        ({"rates": "timm:cosin"}, "rates = 'timm:cosin' can't be used: Unknown scheduler"),
        ({"rates": "timm:plateau"}, "rates = 'timm:plateau' can't be used"),
        ({"optimizer": "lamb"}, "no optimizer 'lamb'"),
        ({"rates": "tanh"}, "no shape of rates 'tanh'"),
    ],
)
def test_what_timm_does_not_have_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        train(net(2), pictures(), Recipe(**options))


def test_vectors_of_a_timm_optimizer_decay_as_the_recipe_says() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    optimizer = make_optimizer(model, Recipe(optimizer="timm:lion", decay_vectors=False), torch.device("cpu"))
    assert type(optimizer).__name__ == "Lion"
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(1, 0.01), (3, 0.0)]


@pytest.mark.slow
@LOOKS_AT_ALL
@pytest.mark.parametrize("name", ["lamb", "lion", "adopt"])
def test_a_training_with_timm_grows_and_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    recipe = Recipe(epochs=4, batch_size=8, learning_rate=0.01, optimizer=f"timm:{name}", rates="timm:tanh")
    state = tmp_path / "state.safetensors"
    with pytest.raises(Interrupted):
        trained(recipe, "dyrep", state, stop_at=12)
    weights, history = trained(recipe, "dyrep", state, resume=True)
    whole, whole_history = trained(recipe, "dyrep")
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[each], whole[each]) for each in whole)
    assert history == whole_history
    assert any(epoch["actions"] for epoch in history)

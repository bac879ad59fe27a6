"""Drop-path: branches leave out images in training mode, and nothing else changes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import repfx
from repfx.blocks.drop_path import set_drop_path
from repfx.data.dataset import DataSet
from repfx.errors import InvalidInput
from repfx.testing import assert_same_map, randomize_batch_norm, relative_error
from repfx.training.loop import Watcher, train
from repfx.training.recipe import Recipe
from tests.random_numbers import numbers_from
from tests.tiny import net

X = torch.randn(40, 4, 7, 5, dtype=torch.float64, generator=numbers_from(0))


def block() -> Any:
    """A block of two branches without BatchNorm, so that no image has an influence on another one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).double()
    return repfx.expand(model, repfx.Spec(["1x1", "1xk"], norm="none"), preserve=False)[0]


def kept(output: Tensor, of: Any, probability: float) -> list[tuple[int, ...]]:
    """Tell for each image which branches took part, by comparing with all possible sums."""
    own, terms = of.origin(X), [branch(X) / (1 - probability) for branch in of.branches.values()]
    found = []
    for index, image in enumerate(output):
        for present in itertools.product((0, 1), repeat=len(terms)):
            wanted = own[index] + sum(factor * term[index] for factor, term in zip(present, terms))
            if relative_error(image, wanted) < 1e-12:
                found.append(present)
    return found


def test_each_branch_leaves_out_images_of_its_own() -> None:
    model = block().train()
    set_drop_path(model, 0.4)
    seen = kept(model(X), model, 0.4)
    assert len(seen) == len(X)
    assert set(seen) == set(itertools.product((0, 1), repeat=2))
    assert 0.4 < sum(map(sum, seen)) / (2 * len(X)) < 0.8


def test_eval_mode_graphs_and_squeezed_blocks_leave_nothing_out() -> None:
    model = block().eval()
    reference = copy.deepcopy(model)
    set_drop_path(model, 0.4)
    assert_same_map(model, reference, X, 0)
    assert_same_map(repfx.fuse(nn.Sequential(model).train()), reference, X)
    assert_same_map(repfx.squeeze(nn.Sequential(copy.deepcopy(model))).train(), reference, X)


def test_a_block_that_recomputes_leaves_out_the_same_images_again() -> None:
    plain, again = block().train(), block().train()
    again.recomputes = True
    gradients = []
    for model in (plain, again):
        set_drop_path(model, 0.4)
        torch.manual_seed(3)
        model(X).square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert relative_error(gradients[1], gradients[0]) < 1e-12


def test_statistics_are_measured_without_it() -> None:
    model = randomize_batch_norm(repfx.expand(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).double(), "acb"))
    other = copy.deepcopy(model)
    set_drop_path(model, 0.9)
    for each in (model, other):
        repfx.drop(each, "0", "1xk", calibrate=[X])
    set_drop_path(model, 0.0)
    assert_same_map(model.train(), other.train(), X, 0)


@pytest.mark.parametrize("probability", [1.0, -0.1])
def test_an_impossible_probability_is_refused(probability: float) -> None:
    with pytest.raises(InvalidInput, match="drop-path"):
        set_drop_path(block(), probability)
    with pytest.raises(InvalidInput, match="drop_path is"):
        Recipe(drop_path=probability)
    with pytest.raises(InvalidInput, match="set compile = false"):
        Recipe(drop_path=0.1, compile=True)


def test_it_rises_over_a_training_and_is_gone_afterwards() -> None:
    model = repfx.expand(net(2), "acb")
    first: Any = model[0]
    seen: list[float] = []
    watcher = Watcher(on_step=lambda step: seen.append(first.drop_path))
    images = TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 2)
    train(model, DataSet(images, images, ("a", "b")), Recipe(epochs=4, batch_size=32, drop_path=0.2), watcher=watcher)
    assert seen == pytest.approx([0.0, 0.05, 0.1, 0.15])
    assert first.drop_path == 0

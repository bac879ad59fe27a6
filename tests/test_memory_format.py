"""Which models get channels last by themselves: those in which nothing can mind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.engine import accelerator_for
from repfx.memory_format import takes_channels_last
from repfx.place import Place
from repfx.recipe import Recipe
from tests.inline_net import Net


class OwnLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.as_strided((1,), (1,))


def convs() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())


def pooled(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.convs(x)
    head: Tensor = m.head(torch.flatten(y.mean((2, 3), keepdim=True), 1))
    return head + y.sum()


def viewed(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.convs(x)
    return y.view(y.shape[0], -1)


def asked(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.convs(x)
    return y if y.is_contiguous() else -y


def strided(m: Any, x: Tensor) -> Tensor:
    return torch.as_strided(m.convs(x), (2, 2), (1, 2))


def by_values(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.convs(x)
    return y if y.sum() > 0 else -y


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: convs(), True),
        (lambda: repfx.expand(convs(), "dbb"), True),
        (lambda: repfx.expand(convs(), "orepa"), True),
        (lambda: repfx.fuse(convs()), True),
        (lambda: Net(pooled, convs=convs(), head=nn.Linear(4, 2)), True),
        (lambda: Net(viewed, convs=convs()), False),
        (lambda: Net(asked, convs=convs()), False),
        (lambda: Net(strided, convs=convs()), False),
        (lambda: Net(by_values, convs=convs()), False),
        (lambda: nn.Sequential(*convs(), OwnLayer()), False),
        (lambda: nn.Sequential(convs(), nn.Sequential(OwnLayer())), False),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 3)), False),
        (lambda: nn.Sequential(nn.Linear(3, 4)), False),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 2, 1)), False),
    ],
)
def test_nothing_in_it_may_mind(model: Callable[[], nn.Module], expected: bool) -> None:
    assert takes_channels_last(model()) is expected


@pytest.mark.parametrize(
    ("code", "given", "expected"),
    [(pooled, None, True), (viewed, None, False), (viewed, True, True), (pooled, False, False)],
)
def test_a_training_lays_out_weights_and_images_alike(
    code: Callable[..., Tensor], given: bool | None, expected: bool
) -> None:
    recipe = Recipe(device="cpu", channels_last=given)
    model = Net(code, convs=convs(), head=nn.Linear(4, 2))
    with accelerator_for(recipe) as accelerator:
        place = Place(accelerator, recipe)
        weight: Any = place.put(model).get_parameter("convs.0.weight")
        images = place.bring(torch.randn(2, 3, 6, 7))
        assert place.bring(torch.arange(3)).tolist() == [0, 1, 2]
    assert [each.is_contiguous(memory_format=torch.channels_last) for each in (weight, images)] == [expected] * 2

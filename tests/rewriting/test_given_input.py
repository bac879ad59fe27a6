"""An example says what the model's own input is, so arithmetic on it becomes part of the first conv."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.testing import randomize_batch_norm, relative_error
from tests.inline_net import Net, reasons
from tests.random_numbers import numbers_from

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


NORMALIZED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean and std": lambda m, x: m.conv((x / 255 - m.mean) / m.std),
    "in other words": lambda m, x: m.conv(x.mul(1 / 255).sub(0.5).div(0.25)),
}


def net(name: str, dimensions: int = 2, **options: Any) -> nn.Module:
    conv = CONVS[dimensions](3, 5, 3, **options)
    model: Any = Net(lambda m, x: NORMALIZED[name](m, x).relu(), conv=conv)
    shape = (-1, *(1,) * dimensions)
    model.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(shape))
    model.register_buffer("std", torch.tensor([0.2, 0.3, 0.1]).view(shape))
    return randomize_batch_norm(model.double()).eval()


def picture(channels: int, dimensions: int = 2) -> Tensor:
    return 255 * torch.rand(2, channels, *(7, 9, 6)[:dimensions], dtype=torch.float64, generator=numbers_from(0))


def arithmetic(model: nn.Module) -> int:
    assert isinstance(model, torch.fx.GraphModule)
    return sum(node.op in ("call_function", "call_method") for node in model.graph.nodes)


@pytest.mark.parametrize("dimensions", CONVS)
@pytest.mark.parametrize("name", NORMALIZED)
def test_it_is_part_of_the_first_conv(name: str, dimensions: int) -> None:
    model, x = net(name, dimensions), picture(3, dimensions)
    fused = repfx.fuse(model, example=x)
    assert arithmetic(fused) == 1
    assert relative_error(fused(x), model(x)) < 1e-12


@pytest.mark.parametrize("name", NORMALIZED)
def test_without_an_example_the_input_may_be_anything(name: str) -> None:
    fused = repfx.fuse(net(name))
    assert arithmetic(fused) > 2
    assert "may hold integers" in reasons(fused)


def test_a_shift_in_front_of_zero_padding_stays() -> None:
    model, x = net("mean and std", padding=1), picture(3)
    fused = repfx.fuse(model, example=x)
    assert relative_error(fused(x), model(x)) < 1e-12
    assert "the zero padding of the second map" in reasons(fused)


def test_an_example_of_whole_numbers_or_of_one_channel_keeps_the_arithmetic() -> None:
    model = net("mean and std")
    for x in (picture(3).to(torch.uint8), picture(1)):
        fused = repfx.fuse(model, example=x)
        assert arithmetic(fused) > 2
        assert relative_error(fused(x), model(x)) < 1e-12

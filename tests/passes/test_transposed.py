"""Transposed convs in sums and in chains with 1×1 convs become one transposed conv."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from tests.inline_net import Net, convs, fused_exactly, norms, reasons
from tests.random_numbers import numbers_from

UPS: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def picture(channels: int, dimensions: int) -> Tensor:
    return torch.randn(2, channels, *(4, 5, 3)[:dimensions], dtype=torch.float64, generator=numbers_from(0))


@pytest.mark.parametrize("dimensions", UPS)
@pytest.mark.parametrize("groups", [1, 2])
def test_branches_with_norms(dimensions: int, groups: int) -> None:
    up, norm = UPS[dimensions], NORMS[dimensions]
    net = Net(
        lambda m, x: m.first(m.wide(x)) + m.second(m.narrow(x)),
        wide=up(4, 6, 4, 2, 1, groups=groups, bias=False),
        first=norm(6),
        narrow=up(4, 6, 2, 2, groups=groups),
        second=norm(6),
    )
    fused = fused_exactly(net, picture(4, dimensions))
    assert (len(convs(fused)), norms(fused)) == (1, [])
    assert fused.get_submodule(convs(fused)[0]).kernel_size == (4,) * dimensions


@pytest.mark.parametrize("dimensions", UPS)
def test_between_1x1_convs(dimensions: int) -> None:
    conv = CONVS[dimensions]
    net = nn.Sequential(conv(3, 8, 1, bias=False), UPS[dimensions](8, 8, 3, 2, 1, 1, groups=2), conv(8, 3, 1))
    fused = fused_exactly(net, picture(3, dimensions))
    assert len(convs(fused)) == 1
    assert type(fused.get_submodule(convs(fused)[0])) is UPS[dimensions]


STAY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a bias in front": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2)),
        "the first map's bias does not reach the border",
    ),
    "a window behind": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 2, 2), nn.Conv2d(8, 3, 3)),
        "composes with nothing but a 1×1 conv",
    ),
}


@pytest.mark.parametrize("case", STAY)
def test_what_is_no_transposed_conv_stays(case: str) -> None:
    build, reason = STAY[case]
    fused = fused_exactly(build(), picture(3, 2))
    assert len(convs(fused)) == 2
    assert reason in reasons(fused)


def test_branches_of_other_sizes_stay() -> None:
    net = Net(
        lambda m, x: m.wide(x) + m.narrow(x)[:, :, 1:-1, 1:-1],
        wide=nn.ConvTranspose2d(4, 6, 4, 2, 1),
        narrow=nn.ConvTranspose2d(4, 6, 4, 2),
    )
    fused = fused_exactly(net, picture(4, 2))
    assert len(convs(fused)) == 2


def test_squeezed_branches_train() -> None:
    net = Net(
        lambda m, x: m.wide(x) + m.narrow(x),
        wide=nn.ConvTranspose2d(4, 6, 4, 2, 1),
        narrow=nn.ConvTranspose2d(4, 6, 2, 2),
    )
    net.double()
    x = picture(4, 2)
    before = net(x)
    repfx.squeeze(net)
    assert torch.allclose(net(x), before, rtol=0, atol=1e-12)
    net(x).square().mean().backward()
    assert all(weight.grad is not None for weight in net.parameters())

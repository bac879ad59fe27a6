"""A padding whose border is overwritten counts as padding with a conv's bias only if all of it gets the bias before any read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.algebra.layers import is_conv
from repfx.testing import assert_equivalent

X = torch.randn(2, 4, 6, 9, dtype=torch.float64)


class Bordered(nn.Module):
    """A 1×1 conv, padded by `border`, then a 3×3 conv."""

    def __init__(self, border: Callable[[Any, Tensor], Any], size: int = 1) -> None:
        super().__init__()
        self.first, self.second, self.border = nn.Conv2d(4, 4, size), nn.Conv2d(4, 4, 3), border

    def forward(self, x: Tensor) -> Any:
        return self.second(self.border(self, self.first(x)))


def padded(
    m: Any, y: Tensor, *, sides: tuple[int, ...] = (1, 1, 1, 1), width: int = 1, factor: float = 1.0, strips: int = 4
) -> Tensor:
    y = F.pad(y, sides)
    for index in [
        (slice(None), slice(None), slice(0, width), slice(None)),
        (slice(None), slice(None), slice(-1, None), slice(None)),
        (slice(None), slice(None), slice(None), slice(None, 1)),
        (slice(None), slice(None), slice(None), slice(-1, None)),
    ][:strips]:
        y[index] = m.value * factor
    return y


def read_too_early(m: Any, y: Tensor) -> Tensor:
    y = F.pad(y, (1, 1, 1, 1))
    total = y.sum()
    y[:, :, 0:1, :] = m.value
    y[:, :, -1:, :] = m.value
    y[:, :, :, 0:1] = m.value
    y[:, :, :, -1:] = m.value
    return y + total


BORDERS: dict[
    str, tuple[Callable[[Any, Tensor], Any], int, int]
] = {  # with the first conv's window, and how many convs are left
    "the bias": (padded, 1, 1),
    "almost the bias": (lambda m, y: padded(m, y, factor=1 + 1e-6), 1, 2),
    "twice the bias": (lambda m, y: padded(m, y, factor=2.0), 1, 2),
    "three sides": (lambda m, y: padded(m, y, strips=3), 1, 2),
    "a wider strip": (lambda m, y: padded(m, y, width=2), 1, 2),
    "another padding": (lambda m, y: padded(m, y, sides=(1, 2, 1, 1)), 1, 2),
    "read before it is written": (read_too_early, 1, 2),
    "a first conv with a window": (padded, 3, 2),
}


@pytest.mark.parametrize("name", BORDERS)
def test_only_a_border_that_is_the_bias_moves_in_front(name: str) -> None:
    torch.manual_seed(0)
    border, size, convs = BORDERS[name]
    model = Bordered(border, size).double().eval()
    bias: Any = model.first.bias
    model.register_buffer("value", bias.detach().clone().view(1, -1, 1, 1))
    fused = repfx.fuse(model)
    assert_equivalent(fused, model, X)
    assert sum(map(is_conv, fused.modules())) == convs, str(repfx.report(fused))

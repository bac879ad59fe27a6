"""Small nets that several tests use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repfx.testing import randomize_batch_norm
from tests.random_numbers import numbers_from


class SmallNet(nn.Module):
    """Conv + BatchNorm, a plain conv, a large depthwise conv + BatchNorm, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-3, momentum=0.2)
        self.plain = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 3, height, width)`` to ``(batch, 4)``."""
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.plain(x))
        x = torch.relu(self.norm2(self.depthwise(x)))
        output: Tensor = self.head(x.mean((2, 3)))
        return output


def small_net(seed: int = 0) -> SmallNet:
    """A `SmallNet` in float64 with random BatchNorms."""
    net = SmallNet().double()
    randomize_batch_norm(net, seed)
    return net


def batch(size: int = 6, seed: int = 0) -> Tensor:
    """Input for a `SmallNet`."""
    return torch.randn(size, 3, 9, 11, dtype=torch.float64, generator=numbers_from(seed))

"""Blocks with learned factors: LayerScale, weighted branches of a supernet."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign_blocks.parts import CHANNELS, Block, conv_norm


class LayerScale(nn.Module):
    """x + γ ⊙ conv(x), γ one number per channel (arXiv 2103.17239)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gamma = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Parameter(torch.rand(1, CHANNELS, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return x + self.gamma * self.conv(x)


class Weighted(nn.Module):
    """Branches weighted by a softmax, as in a supernet of DARTS (arXiv 1806.09055)."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList((conv_norm(3, padding=1), conv_norm(1), nn.BatchNorm2d(CHANNELS)))
        self.alpha = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Any:
        weights = F.softmax(self.alpha, dim=-1)
        return F.relu(sum(w * branch(x) for w, branch in zip(weights, self.branches)))


BLOCKS: dict[str, Block] = {
    "Weighted": (Weighted, 1, 0),
    "LayerScale": (LayerScale, 1, 0),
}

"""DyRep (arXiv 2203.12868)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign_blocks.parts import CHANNELS, Block, conv_norm


class ExpandedBorder(nn.Module):
    """DyRep's BatchNorm, which concatenates its output for zero around the picture (arXiv 2203.12868)."""

    def __init__(self, pixels: int = 1) -> None:
        super().__init__()
        self.norm, self.pixels = nn.BatchNorm2d(CHANNELS), pixels

    def forward(self, x: Tensor) -> Any:
        norm: Any = self.norm
        value = -norm.running_mean / torch.sqrt(norm.running_var + norm.eps)
        value = (norm.bias.data + norm.weight.data * value).view(1, -1, 1, 1)
        n, _, h, w = x.size()
        x = norm(x)
        row = value.expand(n, -1, self.pixels, w)
        x = torch.cat([row, x, row], dim=2)
        h = h + self.pixels * 2
        column = value.expand(n, -1, h, self.pixels)
        return torch.cat([column, x, column], dim=3)


class DyRep(nn.Module):
    """All branches of DyRep's block, as a sum of a stack."""

    def __init__(self) -> None:
        super().__init__()
        sequence = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), ExpandedBorder(), conv_norm(3))
        pooling = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False),
            ExpandedBorder(),
            nn.AvgPool2d(3, 1),
            nn.BatchNorm2d(CHANNELS),
        )
        branches = [conv_norm(3, padding=1), conv_norm(1), sequence, pooling, nn.BatchNorm2d(CHANNELS)]
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Any:
        return F.relu(torch.stack([branch(x) for branch in self.branches]).sum(0))


BLOCKS: dict[str, Block] = {
    "DyRep": (DyRep, 1, 0),
}

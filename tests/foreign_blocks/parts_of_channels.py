"""Blocks that split channels or put them side by side: Inception, FasterNet, C2f."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign_blocks.parts import CHANNELS, Block, conv_norm


class Concatenated(nn.Module):
    """Branches side by side, then 1×1 over all of them (Inception, arXiv 1409.4842)."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.branches = nn.ModuleList((conv_norm(3, padding=1), conv_norm(1), conv_norm(5, padding=2)))
        self.mix, self.norm = nn.Conv2d(3 * CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.norm(self.mix(torch.cat([self.activation(branch(x)) for branch in self.branches], 1))))


class PartialConv(nn.Module):
    """A conv on the first quarter of the channels, then 1×1 on all (FasterNet, arXiv 2303.03667)."""

    def __init__(self, *, sliced: bool) -> None:
        super().__init__()
        self.quarter = CHANNELS // 4
        self.partial = nn.Conv2d(self.quarter, self.quarter, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(self.quarter)
        self.pointwise, self.after = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.sliced = sliced

    def forward(self, x: Tensor) -> Any:
        if self.sliced:
            x = x.clone()
            x[:, : self.quarter] = self.norm(self.partial(x[:, : self.quarter]))
            return F.relu(self.after(self.pointwise(x)))
        first, rest = torch.split(x, [self.quarter, CHANNELS - self.quarter], dim=1)
        return F.relu(self.after(self.pointwise(torch.cat((self.norm(self.partial(first)), rest), 1))))


class C2f(nn.Module):
    """A conv whose output is cut in two halves; all halves and what follows the last one are concatenated (YOLOv8)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = conv_norm(1), nn.ModuleList(self._block() for _ in range(2))
        self.last = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)

    @staticmethod
    def _block() -> nn.Sequential:
        conv = nn.Conv2d(CHANNELS // 2, CHANNELS // 2, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(CHANNELS // 2), nn.SiLU())

    def forward(self, x: Tensor) -> Any:
        parts = list(F.silu(self.first(x)).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.blocks)
        return F.silu(self.last(torch.cat(parts, 1)))


BLOCKS: dict[str, Block] = {
    "C2f": (C2f, 4, 0),
    "PartialConv, split": (lambda: PartialConv(sliced=False), 2, 0),
    "PartialConv, sliced": (lambda: PartialConv(sliced=True), 2, 0),
    "Concatenated": (lambda: Concatenated(nn.Identity()), 1, 0),
    "Concatenated, activated": (lambda: Concatenated(nn.ReLU()), 4, 0),
}

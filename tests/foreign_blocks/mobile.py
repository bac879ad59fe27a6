"""Blocks for phones: MobileOne, RepMixer, RepViT."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign_blocks.parts import CHANNELS, Block, conv_norm


class MobileOne(nn.Module):
    """k depthwise 3×3 in parallel, a 1×1 "scale" and the BatchNorm of the skip (arXiv 2206.04040)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv_norm(3, padding=1, groups=CHANNELS) for _ in range(4))
        self.scale, self.skip = conv_norm(1, groups=CHANNELS), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        out = self.scale(x) + self.skip(x)
        for branch in self.convs:
            out = out + branch(x)
        return F.gelu(out)


class RepMixer(nn.Module):
    """x + γ ⊙ (mixer(x) - norm(x)), where the mixer is a MobileOne block without its activation (arXiv 2303.14189)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer, self.scale = (
            nn.BatchNorm2d(CHANNELS),
            MobileOne(),
            nn.Parameter(torch.rand(CHANNELS, 1, 1)),
        )

    def forward(self, x: Tensor) -> Any:
        mixed = self.mixer.scale(x) + self.mixer.skip(x)
        for branch in self.mixer.convs:
            mixed += branch(x)
        return x + self.scale * (mixed - self.norm(x))


class RepViT(nn.Module):
    """BatchNorm behind the sum of a depthwise 3×3 with BatchNorm, a depthwise 1×1 and the skip (arXiv 2307.09283)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_norm(3, padding=1, groups=CHANNELS)
        self.pointwise = nn.Conv2d(CHANNELS, CHANNELS, 1, groups=CHANNELS)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x) + self.pointwise(x) + x)


BLOCKS: dict[str, Block] = {
    "MobileOne": (MobileOne, 1, 0),
    "RepMixer": (RepMixer, 1, 0),
    "RepViT": (RepViT, 1, 0),
}

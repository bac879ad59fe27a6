"""Blocks for super-resolution and image enhancement: RT4KSR, PlainUSR, RepSR, FMEN, MobileIE."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign_blocks.parts import CHANNELS, Block


class RT4KSR(nn.Module):
    """1×1, padded with its bias, 3×3 with a skip around it, 1×1, and the skip around all (CVPR workshops 2023)."""

    def __init__(self) -> None:
        super().__init__()
        wide = 2 * CHANNELS
        self.expand, self.squeeze = nn.Conv2d(CHANNELS, wide, 1), nn.Conv2d(wide, CHANNELS, 1)
        self.middle = nn.Conv2d(wide, wide, 3)

    def scaled(self, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Any:
        y = self.expand(x)
        bias: Any = self.expand.bias
        border, padded = bias.view(1, -1, 1, 1), F.pad(y, (1, 1, 1, 1), "constant", 0)
        padded[:, :, 0:1, :] = border
        padded[:, :, -1:, :] = border
        padded[:, :, :, 0:1] = border
        padded[:, :, :, -1:] = border
        return F.relu(self.squeeze(self.scaled(self.middle(padded)) + y) + x)


class PlainUSR(RT4KSR):
    """The same with a factor on each channel of the 3×3, which a small net computes from a vector of its own (ACCV 2024)."""

    def __init__(self) -> None:
        super().__init__()
        wide = 2 * CHANNELS
        self.vector = nn.Parameter(torch.randn(1, wide))
        self.attention = nn.Sequential(
            nn.Linear(wide, 4, bias=False), nn.SiLU(), nn.Linear(4, wide, bias=False), nn.Sigmoid()
        )

    def scaled(self, y: Tensor) -> Tensor:
        factors: Tensor = self.attention(self.vector)
        return factors[..., None, None] * y


class RepSR(nn.Module):
    """Two branches of 3×3 with twice the channels, BatchNorm and 1×1, beside a clean skip (arXiv 2205.05671)."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, padding=1, bias=False),
                nn.BatchNorm2d(2 * CHANNELS),
                nn.Conv2d(2 * CHANNELS, CHANNELS, 1),
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Any:
        return F.relu(sum(branch(x) for branch in self.branches) + x)


SLOPE = nn.LeakyReLU(0.1)  # not installed in any module


class HFAB(nn.Module):
    """Attention between two convs, each behind a BatchNorm that is padded with what it returns for zeros (FMEN, NTIRE 2022)."""

    def __init__(self) -> None:
        super().__init__()
        few = CHANNELS // 2
        self.first, self.second, self.third = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(few), nn.BatchNorm2d(CHANNELS)
        self.squeeze, self.excite = nn.Conv2d(CHANNELS, few, 3), nn.Conv2d(few, CHANNELS, 3)

    def forward(self, x: Tensor) -> Any:
        y = SLOPE(self.squeeze(self.padded(x, self.first)))
        return torch.sigmoid(self.third(self.excite(self.padded(y, self.second)))) * x

    def padded(self, y: Any, norm: Any) -> Any:
        deviation = (norm.running_var + norm.eps).sqrt()
        border = (norm.bias - norm.running_mean * norm.weight / deviation).view(1, -1, 1, 1)
        y = F.pad(norm(y), (1, 1, 1, 1), "constant", 0)
        y[:, :, 0:1, :] = border
        y[:, :, -1:, :] = border
        y[:, :, :, 0:1] = border
        y[:, :, :, -1:] = border
        return y


class MobileIE(nn.Module):
    """Convs with four times the channels, concatenated as they are and behind a BatchNorm, then 1×1 (MobileIE, ICCV 2025)."""

    def __init__(self) -> None:
        super().__init__()
        wide, windows = 4 * CHANNELS, ((3, 3), (1, 1), (1, 3), (3, 1))
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, wide, (h, w), padding=(h // 2, w // 2)) for h, w in windows)
        self.norms = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(wide)) for _ in windows)
        self.out = nn.Conv2d(2 * len(windows) * wide, CHANNELS, 1)

    def forward(self, x: Tensor) -> Any:
        raw = [conv(x) for conv in self.convs]
        return F.relu(self.out(torch.cat([*raw, *(norm(y) for norm, y in zip(self.norms, raw))], 1)))


BLOCKS: dict[str, Block] = {
    "MobileIE": (MobileIE, 1, 0),
    "RT4KSR": (RT4KSR, 1, 0),
    "PlainUSR": (PlainUSR, 1, 0),
    "RepSR": (RepSR, 1, 0),
    "FMEN's attention": (HFAB, 2, 0),
}

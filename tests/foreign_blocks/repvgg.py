"""RepVGG (arXiv 2101.03697) and QARepVGG (arXiv 2212.01593)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from tests.foreign_blocks.parts import CHANNELS, Block, conv_norm


class RepVGG(nn.Module):
    """3×3 + 1×1 + identity, each with a BatchNorm (arXiv 2101.03697)."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.pointwise = conv_norm(3, padding=1), conv_norm(1)
        self.identity = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.dense(x) + self.pointwise(x) + self.identity(x))


class QARepVGG(nn.Module):
    """A learned factor on the 1×1, a BatchNorm on the 3×3 alone, and one behind the sum (arXiv 2212.01593)."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.pointwise = conv_norm(3, padding=1), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.alpha = nn.Parameter(torch.tensor(0.7))
        self.post = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.post(self.dense(x) + self.alpha * self.pointwise(x) + x))


class DroppedQARepVGG(nn.Module):
    """QARepVGG with stochastic depth on the convs; the identity has a BatchNorm of its own."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dense, self.pointwise = conv_norm(3, padding=1), nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.identity, self.post = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
        self.drop_path = DropPath(rate)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.post(self.drop_path(self.dense(x) + self.pointwise(x)) + self.identity(x)))


BLOCKS: dict[str, Block] = {
    "RepVGG": (RepVGG, 1, 0),
    "QARepVGG": (QARepVGG, 1, 0),
    "QARepVGG, stochastic depth of rate 0": (lambda: DroppedQARepVGG(0.0), 1, 0),
    "QARepVGG, stochastic depth": (lambda: DroppedQARepVGG(0.1), 1, 2),
}

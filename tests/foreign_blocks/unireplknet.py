"""UniRepLKNet (arXiv 2311.15599)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from tests.foreign_blocks.parts import CHANNELS, Block, conv_norm


class UniRepLKNet(nn.Module):
    """A large depthwise kernel beside small dilated ones, each with a BatchNorm (arXiv 2311.15599)."""

    def __init__(self) -> None:
        super().__init__()
        self.large = conv_norm(9, padding=4, groups=CHANNELS)
        sizes = ((5, 1), (5, 2), (3, 3), (3, 4))
        self.dilated = nn.ModuleList(
            conv_norm(k, padding=d * (k - 1) // 2, groups=CHANNELS, dilation=d) for k, d in sizes
        )

    def forward(self, x: Tensor) -> Any:
        out = self.large(x)
        for branch in self.dilated:
            out = out + branch(x)
        return out


class GlobalResponse(nn.Module):
    """Global response normalisation of channels that come last, as in ConvNeXt V2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Any:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return x * self.gamma * (norm / (norm.mean(-1, keepdim=True) + 1e-6)) + self.beta + x


class ToChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x.permute(0, 3, 1, 2)


class UniRepLKNetBlock(nn.Module):
    """The whole block: a depthwise conv, a BatchNorm, linear layers on channels that come last, a BatchNorm, a scale, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = conv_norm(7, padding=3, groups=CHANNELS)
        self.wide = nn.Sequential(ToChannelsLast(), nn.Linear(CHANNELS, 4 * CHANNELS))
        self.activation = nn.Sequential(nn.GELU(), GlobalResponse(4 * CHANNELS))
        narrow = nn.Linear(4 * CHANNELS, CHANNELS, bias=False)
        self.narrow = nn.Sequential(narrow, ToChannelsFirst(), nn.BatchNorm2d(CHANNELS))
        self.gamma, self.drop_path = nn.Parameter(torch.rand(CHANNELS)), DropPath(0.0)

    def forward(self, x: Tensor) -> Any:
        y = self.narrow(self.activation(self.wide(self.depthwise(x))))
        return F.relu(self.drop_path(self.gamma.view(1, -1, 1, 1) * y) + x)


BLOCKS: dict[str, Block] = {
    "UniRepLKNet": (UniRepLKNet, 1, 0),
    "UniRepLKNet, whole": (UniRepLKNetBlock, 1, 0),
}

"""DBB (arXiv 2103.13425)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign_blocks.parts import CHANNELS, Block, conv_norm


class NormAndPad(nn.Module):
    """DBB's BatchNorm, followed by padding with its output for zero, written strip by strip or as a difference."""

    def __init__(self, pixels: int, *, strips: bool) -> None:
        super().__init__()
        self.norm, self.pixels, self.strips = nn.BatchNorm2d(CHANNELS), pixels, strips

    def forward(self, x: Tensor) -> Any:
        norm: Any = self.norm
        x, pixels = norm(x), self.pixels
        deviation = torch.sqrt(norm.running_var + norm.eps)
        value = norm.bias.detach() - norm.running_mean * norm.weight.detach() / deviation
        value = value.view(1, -1, 1, 1)
        if not self.strips:
            return F.pad(x - value, [pixels] * 4) + value
        x = F.pad(x, [pixels] * 4)
        x[:, :, 0:pixels, :] = value
        x[:, :, -pixels:, :] = value
        x[:, :, :, 0:pixels] = value
        x[:, :, :, -pixels:] = value
        return x


class DBB(nn.Module):
    """k×k + 1×1 + (1×1, k×k) + (1×1, average); behind a first conv, the BatchNorm pads with its output for zero (arXiv 2103.13425)."""

    def __init__(self, *, strips: bool) -> None:
        super().__init__()
        self.dense, self.pointwise = conv_norm(3, padding=1), conv_norm(1)
        self.first, self.first_norm = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), NormAndPad(1, strips=strips)
        self.second = conv_norm(3)
        self.before_average = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.average_norm = NormAndPad(1, strips=strips)
        self.average = nn.Sequential(nn.AvgPool2d(3, 1), nn.BatchNorm2d(CHANNELS))

    def forward(self, x: Tensor) -> Any:
        out = self.dense(x) + self.pointwise(x) + self.second(self.first_norm(self.first(x)))
        return out + self.average(self.average_norm(self.before_average(x)))


class ResidualPointwise(nn.Conv2d):
    """DBB's 1×1 beside the identity: its weight plus the identity's, which is a plain attribute that is moved to the weight's device."""

    def __init__(self, groups: int) -> None:
        super().__init__(CHANNELS, CHANNELS, 1, groups=groups, bias=False)
        per_group = CHANNELS // groups
        unit = torch.zeros(CHANNELS, per_group, 1, 1)
        unit[range(CHANNELS), [index % per_group for index in range(CHANNELS)]] = 1
        self.unit = unit.type_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight + self.unit.to(self.weight.device).type_as(self.weight)
        return F.conv2d(x, kernel, None, stride=1, padding=0, dilation=self.dilation, groups=self.groups)


class DBBWithResidual(nn.Module):
    """k×k + 1×1 + (1×1 beside the identity, k×k), in groups (arXiv 2103.13425)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.dense, self.pointwise = conv_norm(3, padding=1, groups=groups), conv_norm(1, groups=groups)
        self.chain = nn.Sequential(ResidualPointwise(groups), NormAndPad(1, strips=True), *conv_norm(3, groups=groups))

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.dense(x) + self.pointwise(x) + self.chain(x))


BLOCKS: dict[str, Block] = {
    "DBB": (lambda: DBB(strips=True), 1, 0),
    "DBB, by difference": (lambda: DBB(strips=False), 1, 0),
    "DBB with a residual": (lambda: DBBWithResidual(1), 1, 0),
    "DBB with a residual, in groups": (lambda: DBBWithResidual(4), 1, 0),
}

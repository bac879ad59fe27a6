"""Parts of many blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import nn

CHANNELS = 8

# how a block is made, and how many convs and BatchNorms are left of it
Block: TypeAlias = tuple[Callable[[], nn.Module], int, int]


def conv_norm(kernel_size: int, *, padding: int = 0, groups: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(CHANNELS, CHANNELS, kernel_size, padding=padding, groups=groups, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(CHANNELS))

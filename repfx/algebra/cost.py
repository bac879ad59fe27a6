"""The cost of convs, by which `fuse` decides which of them become one: a number for each conv, the fewest weights by default."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Kernel

Shape: TypeAlias = tuple[int, ...]
Cost: TypeAlias = Callable[[ConvSpec, Shape | None], float]


def weights(conv: ConvSpec, shape: Shape | None = None) -> int:
    """Count the weights of a conv, without its bias. A merged conv with no more weights needs no more multiply-adds either.

    >>> from torch import nn
    >>> weights(ConvSpec.of(nn.Conv2d(8, 16, 3, groups=2)))
    576
    """
    return conv.in_channels * conv.out_channels // conv.groups * math.prod(conv.kernel_size)


def output_shape(kernel: Kernel, shape: Shape | None) -> Shape | None:
    """Return the shape of a kernel's output for an input of `shape`, or None if it isn't known."""
    if shape is None or kernel.transposed:
        return None
    if not kernel.dimensions:
        return (*shape[:-1], kernel.out_channels)
    sizes = zip(shape[-kernel.dimensions :], kernel.reach, kernel.stride)
    return (*shape[: -kernel.dimensions - 1], kernel.out_channels, *((n + r - 1) // s + 1 for n, r, s in sizes))

"""A channel of ones beside the input of a kernel, for shifts that can't pass a border.

Behind a conv with a bias, zero padding isn't the bias: the image has a shift, and its border has none. A further input channel of ones,
which is padded with zeros like all others, has the same border. So the bias is a weight on that channel, and the padding is no obstacle.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from repfx.algebra.arithmetic import full
from repfx.algebra.kernel import Kernel, NoKernel


def with_ones(kernel: Kernel) -> Kernel:
    """Return the same map on inputs that have one more channel, the last one, which it doesn't read yet.

    Raises:
        NoKernel: the kernel is transposed.
    """
    if kernel.transposed:
        raise NoKernel("a transposed convolution can't be given a channel of ones")
    weight = kernel.ungroup().weight
    unread = full(weight, (weight.shape[0], 1, *weight.shape[2:]), 0.0)
    return replace(kernel, weight=torch.cat([weight, unread], 1), groups=1)


def bias_on_ones(kernel: Kernel) -> Kernel:
    """Return the same map with its bias as a weight on its last input channel, which has to be one everywhere.

    The weight stands at a tap that never reaches the padding. A kernel without such a tap is returned as it is.
    """
    taps = [-(-before // step) if before > 0 else 0 for (before, _), step in zip(kernel.padding, kernel.dilation)]
    axes = zip(taps, kernel.padding, kernel.dilation, kernel.kernel_size)
    if kernel.bias is None or any(
        tap >= size or (size - 1 - tap) * step < after for tap, (_, after), step, size in axes
    ):
        return kernel
    if kernel.weight.is_meta:
        return replace(kernel, bias=None)
    weight = kernel.weight.clone()
    on_ones = weight[:, -1].permute(*range(1, kernel.dimensions + 1), 0)  # ``(*window, out)``
    on_ones[tuple(taps)] += kernel.bias
    return replace(kernel, weight=weight, bias=None)

"""Padding with the bias of a conv: ``F.pad`` adds zeros, then code writes the bias over the border, strip by strip.

The bias is what the conv outputs for zeros. DBB and ECBSR pad in this way between a 1×1 and a k×k conv, so that the two equal one conv with
padding in front.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from repfx.algebra.kernel import Kernel, NoKernel, Padding
from repfx.graphs.aliasing import reads_only_the_form
from repfx.graphs.constants import Constants
from repfx.graphs.operations import Op, per_channel

CLOSE = 1e-12  # largest relative difference that counts as rounding in float64


@dataclass(frozen=True)
class Border:
    """A padding node, the nodes that write its border, and the values that each of them writes, ``(channels,)``."""

    padded: fx.Node
    writes: tuple[fx.Node, ...]
    values: tuple[Tensor, ...]


def read_border(node: fx.Node, padding: Padding, channels: int, constants: Constants) -> Border | None:
    """Return the border of a padding by zeros, or None unless constants are written over all of it before another node reads it."""
    writes = [user for user in node.users if user.target is operator.setitem and user.args[0] is node]
    strips = {(axis, side): size for axis, pair in enumerate(padding) for side, size in enumerate(pair) if size}
    found = [_strip(write, len(padding)) for write in writes]
    if not strips or None in found or {strip[:2]: strip[2] for strip in found if strip} != strips:
        return None
    others = [user for user in node.users if user not in writes and not reads_only_the_form(user)]
    if any(other < write for other in others for write in writes) or len(writes) != len(strips):
        return None
    values = [constants.number(write.args[2]) for write in writes]
    written = [torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in values if value is not None]
    try:
        vectors = [per_channel(value, channels, len(padding)) for value in written]
    except NoKernel:
        return None
    return Border(node, tuple(writes), tuple(vectors)) if len(vectors) == len(writes) else None


def _strip(write: fx.Node, dimensions: int) -> tuple[int, int, int] | None:
    """Return axis, side (0 before, 1 after) and width of the strip of the border that a write fills, or None if it fills none."""
    index: Any = write.args[1]
    if not isinstance(index, tuple) or len(index) != dimensions + 2 or not all(isinstance(s, slice) for s in index):
        return None
    cut = [(axis - 2, part) for axis, part in enumerate(index) if part != slice(None)]
    if len(cut) != 1 or cut[0][0] < 0 or cut[0][1].step not in (None, 1):
        return None
    axis, part = cut[0]
    if part.start in (None, 0) and isinstance(part.stop, int) and part.stop > 0:
        return axis, 0, part.stop
    if part.stop is None and isinstance(part.start, int) and part.start < 0:
        return axis, 1, -part.start
    return None


def padded_before(conv: Op, padding: Padding, border: Border) -> Op | None:
    """Return the conv with zeros padded around its input, or None unless it then outputs on the border what `border` writes.

    The conv must be 1×1, of stride 1, without padding and not transposed.
    """
    like = torch.empty((), dtype=torch.float64, device="cpu")
    kernel = conv.meaning.build(like, conv.meaning.in_channels or 0, len(padding))
    simple = all(size == 1 for size in (*kernel.kernel_size, *kernel.stride)) and not any(map(any, kernel.padding))
    if kernel.transposed or not simple or kernel.weight.is_meta:
        return None
    bias = kernel.weight.new_zeros(kernel.out_channels) if kernel.bias is None else kernel.bias.detach()
    largest = max(float(bias.abs().max()), *(float(value.abs().max()) for value in border.values))
    if any(float((value - bias.to(value)).abs().max()) > CLOSE * largest for value in border.values):
        return None

    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        return replace(conv.meaning.build(like, channels, dimensions), padding=padding)

    return replace(conv, meaning=replace(conv.meaning, build=build))

"""The windows of transposed convs along one axis, and the one window that holds the taps of two of them.

A transposed conv computes ``y[i·s - p + t·d] += w[t] · x[i]`` and outputs ``(n - 1)·s + extent + 1`` numbers for n. So two of them add if
their strides and extents are equal. Their taps are laid on the common lattice of the offsets ``-p + t·d``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TransposedWindow:
    """The sizes of a transposed conv along one axis: `size` taps, `padding` cut off each side, `output_padding` added behind."""

    size: int
    padding: int
    dilation: int
    output_padding: int

    @property
    def extent(self) -> int:
        """How much longer the output is than what the stride alone gives."""
        return self.dilation * (self.size - 1) - 2 * self.padding + self.output_padding

    def with_taps_of(self, other: TransposedWindow, stride: int) -> TransposedWindow:
        """Return the smallest window of the same extent that holds the taps of both. Their extents are equal.

        Torch takes no negative padding behind the output, and none as large as both stride and dilation. More taps of zero in front or
        behind bring it into that range.

        >>> TransposedWindow(4, 1, 1, 0).with_taps_of(TransposedWindow(2, 0, 1, 0), stride=2)
        TransposedWindow(size=4, padding=1, dilation=1, output_padding=0)
        """
        gaps = [each.dilation for each in (self, other) if each.size > 1] + [abs(self.padding - other.padding)]
        step = math.gcd(*gaps) or 1
        padding = max(self.padding, other.padding)
        last = max(each.dilation * (each.size - 1) - each.padding for each in (self, other))
        size = (last + padding) // step + 1
        behind = self.extent - step * (size - 1) + 2 * padding
        in_front = max(0, -(behind // step))
        at_the_end = max(0, -((max(stride, step) - 1 - behind) // step))
        behind += step * (in_front - at_the_end)
        return TransposedWindow(size + in_front + at_the_end, padding + step * in_front, step, behind)

    def places_in(self, whole: TransposedWindow) -> slice:
        """Return where the taps lie in a window that holds them all."""
        start = (whole.padding - self.padding) // whole.dilation
        apart = self.dilation // whole.dilation if self.size > 1 else 1
        return slice(start, start + (self.size - 1) * apart + 1, apart)

"""Dilated 2×2, 1×2 and 2×1: the outermost taps of a 3×3 window alone."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Ints
from repfx.blocks.branch import Branch
from repfx.blocks.stages import Norm, Stages, conv_stages


class DilatedCorners(Branch):
    """2×2 conv with dilation 2: the corners of a 3×3 window (IRepNAS, IREPS)."""

    kind = "dilated-2x2"
    taps: ClassVar[Ints] = (2, 2)

    @classmethod
    def refusal(cls, site: ConvSpec) -> str | None:
        return None if site.kernel_size == (3, 3) else "it is defined for windows of 3×3"

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor) -> Stages:
        yield from conv_stages("conv", site.inner(cls.taps, cls.taps), like)
        yield from norm.last(site.out_channels, site.dimensions, like)


class DilatedRow(DilatedCorners):
    """1×2 conv with dilation 2: the ends of the middle row of a 3×3 window (IRepNAS, IREPS)."""

    kind = "dilated-1x2"
    taps = (1, 2)


class DilatedColumn(DilatedCorners):
    """2×1 conv with dilation 2: the ends of the middle column of a 3×3 window (IRepNAS, IREPS)."""

    kind = "dilated-2x1"
    taps = (2, 1)

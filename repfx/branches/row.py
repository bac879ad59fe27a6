"""1×k and k×1: the middle row and the middle column of the window."""

from __future__ import annotations

from torch import Tensor

from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.branch import Branch
from repfx.blocks.stages import Norm, Stages, conv_stages


class Row(Branch):
    """1×k conv, the middle row (ACNet); in 3d 1×k×k, the spatial part of the window."""

    kind = "1xk"

    @classmethod
    def refusal(cls, site: ConvSpec) -> str | None:
        if site.dimensions == 1:
            return "a 1d window has no rows"
        if site.is_pointwise:
            return "the window is 1×1 already"
        if site.kernel_size[0] == 1:
            return "the window is a single row already"
        if all(k == 1 for k in site.kernel_size[1:]):
            return "the window is a single column: its middle row is a 1×1"
        return None

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor) -> Stages:
        yield from conv_stages("conv", site.inner((1, *site.kernel_size[1:])), like)
        yield from norm.last(site.out_channels, site.dimensions, like)


class Column(Branch):
    """k×1 conv, the middle column (ACNet); in 3d k×1×1, the temporal part of the window."""

    kind = "kx1"

    @classmethod
    def refusal(cls, site: ConvSpec) -> str | None:
        if site.dimensions == 1:
            return "a 1d window has no columns"
        if site.is_pointwise:
            return "the window is 1×1 already"
        if site.kernel_size[0] == 1:
            return "the window is a single row: its middle column is a 1×1"
        if all(k == 1 for k in site.kernel_size[1:]):
            return "the window is a single column already"
        return None

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor) -> Stages:
        yield from conv_stages("conv", site.inner((site.kernel_size[0], *(1,) * (site.dimensions - 1))), like)
        yield from norm.last(site.out_channels, site.dimensions, like)

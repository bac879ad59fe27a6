"""Dilated: a small kernel spread over a large window."""

from __future__ import annotations

from torch import Tensor

from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.branch import Branch, require_positive
from repfx.blocks.stages import Norm, Stages, conv_stages


class Dilated(Branch):
    """A dilated conv inside the window, of `kernel_size` taps at distance `dilation` along each axis (UniRepLKNet)."""

    kind = "dilated"

    @classmethod
    def refusal(cls, site: ConvSpec, kernel_size: int = 3, dilation: int = 2) -> str | None:
        require_positive(cls.kind, kernel_size=kernel_size, dilation=dilation)
        extent = (kernel_size - 1) * dilation + 1
        if extent > min(site.kernel_size):
            return f"{kernel_size} taps with dilation {dilation} cover {extent}, the window is {'×'.join(map(str, site.kernel_size))}"
        return None

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor, kernel_size: int = 3, dilation: int = 2) -> Stages:
        inner = site.inner((kernel_size,) * site.dimensions, (dilation,) * site.dimensions)
        yield from conv_stages("conv", inner, like)
        yield from norm.last(site.out_channels, site.dimensions, like)

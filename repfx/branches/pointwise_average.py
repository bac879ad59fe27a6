"""1×1–average: mix the channels, then the mean over the window."""

from __future__ import annotations

from torch import Tensor

from repfx.algebra.baking import conv_module
from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.branch import Branch
from repfx.blocks.stages import AVERAGE_POOL_OF, Norm, Pad, Stages


class PointwiseAverage(Branch):
    """1×1 conv, then average pooling (DBB transform V), padded before the first BatchNorm. Depthwise sites have no 1×1 conv, as in DBB."""

    kind = "1x1-avg"

    @classmethod
    def refusal(cls, site: ConvSpec) -> str | None:
        if site.is_pointwise:
            return "the window is 1×1 already"
        if any(d != 1 for d in site.dilation):
            return f"dilation {'×'.join(map(str, site.dilation))}: average pooling has none"
        if site.is_depthwise and site.in_channels != site.out_channels:
            return f"depthwise pooling can't give {site.out_channels} channels from {site.in_channels}"
        return None

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor) -> Stages:
        ones = (1,) * site.dimensions
        unpadded = ((0, 0),) * site.dimensions
        if not site.is_depthwise:
            mix = ConvSpec(site.in_channels, site.out_channels, ones, ones, unpadded, ones, site.groups)
            yield "conv", conv_module(mix, like, bias=False)
        yield "pad", Pad(site.padding, site.padding_mode)  # comes after the 1×1 conv, which maps zero to zero
        if not site.is_depthwise:
            yield from norm.inside("norm1", site.out_channels, site.dimensions, like)
        yield "pool", AVERAGE_POOL_OF[site.dimensions](site.kernel_size, site.stride)
        yield from norm.last(site.out_channels, site.dimensions, like)

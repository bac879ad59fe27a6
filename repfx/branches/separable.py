"""Depthwise-separable: the window on each channel alone, then mix the channels."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from repfx.algebra.baking import conv_module
from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.branch import Branch, require_positive
from repfx.blocks.stages import Norm, Stages, conv_stages


class Separable(Branch):
    """Depthwise k×k conv with `expansion` filters per channel, then 1×1 conv (OREPA)."""

    kind = "separable"

    @classmethod
    def refusal(cls, site: ConvSpec, expansion: int = 8) -> str | None:
        require_positive(cls.kind, expansion=expansion)
        if site.is_depthwise:
            return "the site is depthwise already"
        return "the window is 1×1 already" if site.is_pointwise else None

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor, expansion: int = 8) -> Stages:
        ones = (1,) * site.dimensions
        unpadded = ((0, 0),) * site.dimensions
        middle = expansion * site.in_channels
        depthwise = replace(site, out_channels=middle, groups=site.in_channels)
        mix = ConvSpec(middle, site.out_channels, ones, ones, unpadded, ones, site.groups)
        yield from conv_stages("conv1", depthwise, like)
        yield from norm.inside("norm1", middle, site.dimensions, like)
        yield "conv2", conv_module(mix, like, bias=False)
        yield from norm.last(site.out_channels, site.dimensions, like)

"""1×1–k×k: mix the channels, then the whole window."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from repfx.algebra.baking import conv_module
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.layers import Layer
from repfx.blocks.branch import Branch, require_positive
from repfx.blocks.stages import Norm, Pad, Residual, Stages


class PointwiseFull(Branch):
    """1×1 conv, then k×k conv (DBB transform III). Padding comes before the BatchNorms, so this is one conv in training mode too.

    The 1×1 conv has `expansion` times as many output channels as the site has input channels; by default once as many, or twice in
    depthwise sites. Where it can, it begins as the identity, as DBB's does. With `residual` it is I + P, where P begins as zero, so that
    weight decay pulls it to the identity (OREPA). ECBSR has an expansion of 2.
    """

    kind = "1x1-kxk"
    serves_linear = True

    @classmethod
    def refusal(cls, site: ConvSpec, residual: bool = False, expansion: int | None = None) -> str | None:
        if expansion is not None:
            require_positive(cls.kind, expansion=expansion)
        return "the window is 1×1 already" if site.is_pointwise else None

    @classmethod
    def stages(
        cls, site: ConvSpec, norm: Norm, like: Tensor, residual: bool = False, expansion: int | None = None
    ) -> Stages:
        middle = site.in_channels * (expansion or (2 if site.is_depthwise else 1))
        ones = (1,) * site.dimensions
        unpadded = ((0, 0),) * site.dimensions
        mix = ConvSpec(site.in_channels, middle, ones, ones, unpadded, ones, site.groups)
        pointwise: Layer = conv_module(mix, like, bias=False)
        if middle == site.in_channels and residual:
            nn.init.zeros_(pointwise.weight)
            pointwise = Residual(pointwise)
        elif middle == site.in_channels:
            _begin_as_identity(pointwise, site)
        yield "conv1", pointwise
        yield "pad", Pad(site.padding, site.padding_mode)  # comes after the 1×1 conv, which maps zero to zero
        yield from norm.inside("norm1", middle, site.dimensions, like)
        yield "conv2", conv_module(replace(site, in_channels=middle, padding=unpadded), like, bias=False)
        yield from norm.last(site.out_channels, site.dimensions, like)


def _begin_as_identity(pointwise: Layer, site: ConvSpec) -> None:
    if site.is_linear:
        nn.init.eye_(pointwise.weight)
    else:
        nn.init.dirac_(pointwise.weight, site.groups)

"""1×1–k×k–1×1: more channels, the whole window, and back."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from repfx.algebra.baking import conv_module
from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.branch import Branch, require_positive
from repfx.blocks.stages import Norm, Pad, Stages


class PointwiseFullPointwise(Branch):
    """1×1 conv to `expansion` times as many channels, k×k conv, then 1×1 conv back (SPAN's Conv3XC; RepSR). x is padded first.

    With W₁, W, W₂ the weights, the branch computes ``W₂ ∗ W ∗ W₁ ∗ pad(x)``, so it is one conv even if its convs have biases, as with
    `bias`. Where the spec puts BatchNorms behind the convs, they have no biases, which the BatchNorms would only take away.

    >>> import repfx
    >>> from torch import nn
    >>> branch = repfx.BranchSpec("1x1-kxk-1x1", {"expansion": 2, "bias": True})
    >>> model = repfx.expand(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)), repfx.Spec([branch], norm="none"))
    >>> model[0].branches["1x1-kxk-1x1"].conv2
    Conv2d(8, 16, kernel_size=(3, 3), stride=(1, 1))
    """

    kind = "1x1-kxk-1x1"
    serves_linear = True

    @classmethod
    def refusal(cls, site: ConvSpec, expansion: int = 2, bias: bool = False) -> str | None:
        require_positive(cls.kind, expansion=expansion)
        return "the window is 1×1 already" if site.is_pointwise else None

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor, expansion: int = 2, bias: bool = False) -> Stages:
        ones, unpadded = (1,) * site.dimensions, ((0, 0),) * site.dimensions
        wide_in, wide_out = expansion * site.in_channels, expansion * site.out_channels
        widen = ConvSpec(site.in_channels, wide_in, ones, ones, unpadded, ones, site.groups)
        full = replace(site, in_channels=wide_in, out_channels=wide_out, padding=unpadded)
        narrow = replace(widen, in_channels=wide_out, out_channels=site.out_channels)
        biased = bias and not norm.normalises
        yield "pad", Pad(site.padding, site.padding_mode)
        yield "conv1", conv_module(widen, like, bias=biased)
        yield from norm.inside("norm1", wide_in, site.dimensions, like)
        yield "conv2", conv_module(full, like, bias=biased)
        yield from norm.inside("norm2", wide_out, site.dimensions, like)
        yield "conv3", conv_module(narrow, like, bias=biased)
        yield from norm.last(site.out_channels, site.dimensions, like)

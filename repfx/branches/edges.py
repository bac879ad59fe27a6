"""Sobel and Laplacian: mix the channels, then a fixed filter that finds edges."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor, nn

from repfx.algebra.baking import conv_module
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.layers import Layer
from repfx.blocks.branch import Branch
from repfx.blocks.stages import Norm, Pad, Scale, Stages

_SLOPE = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, device="cpu")
_SMOOTH = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64, device="cpu")


class SobelX(Branch):
    """1×1 conv, then the fixed Sobel filter along the last axis of each channel, scaled by learned numbers (ECBSR).

    With W the weight of the 1×1 conv and D the filter, the branch computes ``s · (D ∗ W ∗ x) + t`` per channel, where t is there with
    `bias` alone. D is 1, 0, -1 along its own axis and 1, 2, 1 along the others. It has 3 taps along each axis, lies in the middle of the
    window, and takes its dilation. Its taps sum to zero, so a bias of the 1×1 conv would do nothing, and there is none. If the spec asks
    for a BatchNorm, its γ and β take the place of s and t.

    >>> import repfx
    >>> net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    >>> block = repfx.expand(net, repfx.Spec(["1x1-sobel-x"], norm="none"))[0]
    >>> block.branches["1x1-sobel-x"].filter.weight[0, 0]
    tensor([[ 1.,  0., -1.],
            [ 2.,  0., -2.],
            [ 1.,  0., -1.]])
    """

    kind = "1x1-sobel-x"
    axis: ClassVar[int] = -1

    @classmethod
    def refusal(cls, site: ConvSpec, bias: bool = False) -> str | None:
        if site.dimensions < -cls.axis:
            return f"it needs {-cls.axis} axes, the window has {site.dimensions}"
        return _room(site)

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor, bias: bool = False) -> Stages:
        lines = [_SMOOTH] * site.dimensions
        lines[cls.axis] = _SLOPE
        yield from _filtered(site, norm, like, reduce(lambda grid, line: grid.unsqueeze(-1) * line, lines), bias=bias)


class SobelY(SobelX):
    """1×1 conv, then the fixed Sobel filter along the last axis but one (ECBSR); otherwise as ``1x1-sobel-x``."""

    kind = "1x1-sobel-y"
    axis = -2


class SobelZ(SobelX):
    """1×1 conv, then the fixed Sobel filter along the first of three axes; otherwise as ``1x1-sobel-x``."""

    kind = "1x1-sobel-z"
    axis = -3


class Laplacian(Branch):
    """1×1 conv, then the fixed Laplacian filter on each channel, scaled by learned numbers (ECBSR).

    The filter is the sum of 1, -2, 1 along each axis. All else is as with ``1x1-sobel-x``.
    """

    kind = "1x1-laplacian"

    @classmethod
    def refusal(cls, site: ConvSpec, bias: bool = False) -> str | None:
        return _room(site)

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor, bias: bool = False) -> Stages:
        taps = torch.zeros((3,) * site.dimensions, dtype=torch.float64, device="cpu")
        for axis in range(site.dimensions):
            through_the_centre = tuple(slice(None) if other == axis else 1 for other in range(site.dimensions))
            taps[through_the_centre] += torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64, device="cpu")
        yield from _filtered(site, norm, like, taps, bias=bias)


def _room(site: ConvSpec) -> str | None:
    """Why the filter doesn't fit into the window of a site, or None."""
    window = "×".join(map(str, site.kernel_size))
    return f"the window {window} has no 3 taps along each axis" if min(site.kernel_size) < 3 else None


def _filtered(site: ConvSpec, norm: Norm, like: Tensor, taps: Tensor, *, bias: bool) -> Stages:
    """Yield a 1×1 conv, the fixed filter `taps` in the middle of the window of each channel, and what scales it."""
    ones, unpadded = (1,) * site.dimensions, ((0, 0),) * site.dimensions
    inner = site.inner(tuple(taps.shape))
    mix = ConvSpec(site.in_channels, site.out_channels, ones, ones, unpadded, ones, site.groups)
    each = replace(inner, in_channels=site.out_channels, groups=site.out_channels, padding=unpadded)
    fixed: Layer = conv_module(each, like, bias=False)
    fixed.weight = nn.Parameter(taps.to(like).expand_as(fixed.weight).clone(), requires_grad=False)
    yield "conv", conv_module(mix, like, bias=False)
    yield "pad", Pad(inner.padding, site.padding_mode)  # comes after the 1×1 conv, which maps zero to zero
    yield "filter", fixed
    if norm.normalises:
        yield from norm.last(site.out_channels, site.dimensions, like)
    else:
        yield "scale", Scale(site.out_channels, site.dimensions, bias=bias, device=like.device, dtype=like.dtype)

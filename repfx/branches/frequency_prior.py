"""Frequency prior: mix the channels, then fixed cosine filters."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from repfx.algebra.baking import conv_module
from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.branch import Branch
from repfx.blocks.stages import Norm, Pad, Stages


class FrequencyPrior(Branch):
    """1×1 conv, then a fixed cosine filter per output channel (OREPA): the first half along the columns, the rest along the rows."""

    kind = "frequency-prior"

    @classmethod
    def refusal(cls, site: ConvSpec) -> str | None:
        if site.dimensions != 2:
            return f"it is defined for 2 dimensions, the site has {site.dimensions}"
        return "the window is 1×1 already" if site.is_pointwise else None

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor) -> Stages:
        unpadded = ((0, 0), (0, 0))
        mix = ConvSpec(site.in_channels, site.out_channels, (1, 1), (1, 1), unpadded, (1, 1), site.groups)
        filters = replace(site, in_channels=site.out_channels, groups=site.out_channels, padding=unpadded)
        prior = conv_module(filters, like, bias=False)
        prior.weight = nn.Parameter(_cosines(site, like).unsqueeze(1), requires_grad=False)
        yield "conv", conv_module(mix, like, bias=False)
        yield "pad", Pad(site.padding, site.padding_mode)  # comes after the 1×1 conv, which maps zero to zero
        yield from norm.inside("norm1", site.out_channels, 2, like)
        yield "prior", prior
        yield from norm.last(site.out_channels, 2, like)


def _cosines(site: ConvSpec, like: Tensor) -> Tensor:
    """``(out, kh, kw)``: cos(π (position + ½) · frequency / size), frequencies 1, 2, … in each half."""
    height, width = site.kernel_size
    half = site.out_channels // 2
    frequency = torch.arange(1, site.out_channels + 1, dtype=torch.float64, device="cpu")
    rows = torch.arange(height, dtype=torch.float64, device="cpu") + 0.5
    columns = torch.arange(width, dtype=torch.float64, device="cpu") + 0.5
    down = torch.cos(math.pi * rows * frequency[:half, None] / height)
    across = torch.cos(math.pi * columns * (frequency[half:, None] - half) / width)
    filters = torch.cat([down[:, :, None].expand(-1, -1, width), across[:, None, :].expand(-1, height, -1)])
    return filters.to(like)

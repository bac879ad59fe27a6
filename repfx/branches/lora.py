"""LoRA: a conv of low rank, which begins at zero."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, nn

from repfx.algebra.baking import conv_module
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.layers import Layer
from repfx.blocks.branch import Branch, require_positive
from repfx.blocks.stages import Factor, Norm, Stages, conv_stages
from repfx.errors import InvalidInput


class LoRA(Branch):
    """k×k conv to `rank` channels, times alpha / rank, then 1×1 conv that begins at zero (LoRA, eq. 3, of a conv).

    The branch computes ``alpha / rank · B ∗ A ∗ x``, with A ``(rank, in, *window)`` and B ``(out, rank, 1, …)``. A site with groups has
    `rank` channels for each group. `alpha` is `rank` by default, so that the factor is 1. B is zero at first whatever the spec says of
    weights, so the function stays without a BatchNorm: a spec with BatchNorms puts none here.

    To train this branch alone, freeze the model before it is expanded:

    >>> import repfx
    >>> net = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1)).requires_grad_(False)
    >>> tuned = repfx.expand(net, [repfx.BranchSpec("lora", {"rank": 4, "alpha": 8})])
    >>> [name for name, weight in tuned.named_parameters() if weight.requires_grad]
    ['0.lora.down.weight', '0.lora.up.weight']
    """

    kind = "lora"
    serves_linear = True

    @classmethod
    def refusal(cls, site: ConvSpec, rank: int = 4, alpha: float | None = None) -> str | None:
        require_positive(cls.kind, rank=rank)
        if alpha is not None and not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha):
            raise InvalidInput(
                f"branch kind {cls.kind!r} takes a finite number other than zero as alpha, not {alpha!r}."
            )
        return "each channel of a depthwise conv has rank 1 already" if site.is_depthwise else None

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor, rank: int = 4, alpha: float | None = None) -> Stages:
        ones, unpadded = (1,) * site.dimensions, ((0, 0),) * site.dimensions
        middle = rank * site.groups
        up: Layer = conv_module(
            ConvSpec(middle, site.out_channels, ones, ones, unpadded, ones, site.groups), like, bias=False
        )
        nn.init.zeros_(up.weight)
        yield from conv_stages("down", replace(site, out_channels=middle), like)
        yield "factor", Factor(1.0 if alpha is None else alpha / rank)
        yield "up", up
        if not norm.normalises:
            yield from norm.last(site.out_channels, site.dimensions, like)

    @property
    def free_convs(self) -> list[Layer]:
        return [conv for conv in super().free_convs if conv is not self.up]

"""1×1: the centre of the window alone."""

from __future__ import annotations

from torch import Tensor

from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.branch import Branch
from repfx.blocks.stages import Norm, Stages, conv_stages


class Pointwise(Branch):
    """1×1 conv at the centre of the window (RepVGG; DBB transform II). Beside a linear layer, another linear layer."""

    kind = "1x1"
    serves_linear = True

    @classmethod
    def refusal(cls, site: ConvSpec) -> str | None:
        return "the window is 1×1 already" if site.is_pointwise else None

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor) -> Stages:
        yield from conv_stages("conv", site.inner((1,) * site.dimensions), like)
        yield from norm.last(site.out_channels, site.dimensions, like)

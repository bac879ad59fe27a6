"""Identity: the input itself, normalised."""

from __future__ import annotations

from torch import Tensor

from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.branch import Branch
from repfx.blocks.stages import Norm, Pad, Stages


class Identity(Branch):
    """The input itself, then a BatchNorm (RepVGG). It is cropped or padded where the site changes the size."""

    kind = "identity"
    serves_linear = True

    @classmethod
    def refusal(cls, site: ConvSpec) -> str | None:
        if site.in_channels != site.out_channels:
            return f"{site.in_channels} channels go in and {site.out_channels} come out"
        if any(s != 1 for s in site.stride):
            return f"stride {'×'.join(map(str, site.stride))}"
        return None

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor) -> Stages:
        yield "pad", Pad(site.inner((1,) * site.dimensions).padding, site.padding_mode)
        yield from norm.last(site.out_channels, site.dimensions, like)

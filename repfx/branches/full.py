"""k×k: the whole window once more."""

from __future__ import annotations

from torch import Tensor

from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.branch import Branch
from repfx.blocks.stages import Norm, Stages, conv_stages


class Full(Branch):
    """A further conv like the site's own (MobileOne's over-parameterization).

    It serves 1×1 sites, transposed convs and linear layers, too.
    """

    kind = "kxk"
    serves_transposed = True
    serves_linear = True

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor) -> Stages:
        yield from conv_stages("conv", site, like)
        yield from norm.last(site.out_channels, site.dimensions, like)

"""The scale of each path of a block: mean |γ| of its last BatchNorm or `TrackedNorm`."""

from __future__ import annotations

import torch
from torch import nn

from repfx.blocks.block import RepBlock

ORIGIN = "origin"


@torch.no_grad()
def gammas_of(block: RepBlock) -> dict[str, float | None]:
    """Return the scales of a block's paths by name, the site's own conv (``origin``) first; None for a path without γ.

    >>> import repfx
    >>> model = repfx.expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), ["1x1"])
    >>> gammas_of(model[0])
    {'origin': 1.0, '1x1': 0.0}
    """
    gammas = {name: path.last_gamma for name, path in {ORIGIN: block.origin, **block.branches}.items()}
    known = [gamma.abs().mean() for gamma in gammas.values() if gamma is not None]
    means = iter(torch.stack(known).tolist() if known else [])  # one transfer from the device
    return {name: None if gamma is None else next(means) for name, gamma in gammas.items()}


def gammas_in(model: nn.Module) -> dict[str, dict[str, float | None]]:
    """Return the scales of the paths of all blocks, by path of the block."""
    return {path: gammas_of(block) for path, block in model.named_modules() if isinstance(block, RepBlock)}

"""`recompute`: blocks keep their input alone for the backward pass, and run once more there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from repfx.blocks.paths import blocks_at
from repfx.records.report import Edit, Report
from repfx.rewriting.pipeline import verb


@verb
def recompute(model: nn.Module, sites: str | Sequence[str] = "*", *, enabled: bool = True) -> nn.Module:
    """Let blocks keep their input alone for the backward pass, and run once more there (activation checkpointing).

    A block of n branches otherwise keeps n feature maps and more. So memory comes near that of the plain model, for the price of a second
    forward pass of the blocks. Outputs, gradients and running statistics are the same: BatchNorms count the batch once. Hooks inside hear
    both passes. Squeezed blocks have little to keep and run as they do; so do all under `torch.compile`, whose own partitioner decides
    what is kept.

    The model is changed in place and returned. What computes stays, so the journal has no word of it, and `load` doesn't bring it back.

    Args:
        sites: a pattern of the paths of blocks, or several.
        enabled: False is the way back.

    Raises:
        UnknownName: no block at such a path; InvalidInput: no block at all.

    >>> from repfx.passes.expand import expand
    >>> recompute(expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb"))[0].recomputes
    True
    """
    blocks = blocks_at(model, sites)
    for block in blocks.values():
        block.recomputes = enabled
    Report("recompute", tuple(Edit("recompute", path) for path in blocks)).attach(model)
    return model

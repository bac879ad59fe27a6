"""`recompute`: let blocks keep only their input for the backward pass, and run once more there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from repfx.blocks.paths import blocks_at
from repfx.records.report import Edit, Report
from repfx.rewriting.pipeline import verb


@verb
def recompute(model: nn.Module, sites: str | Sequence[str] = "*", *, enabled: bool = True) -> nn.Module:
    """Let blocks keep only their input for the backward pass, and run once more there (activation checkpointing).

    A block of n branches otherwise keeps n feature maps and more. With this, memory comes near that of the plain model, at the price
    of a second forward pass of the blocks. Outputs, gradients and running statistics stay the same, because BatchNorms count each
    batch once. Hooks inside a block are called in both passes. Squeezed blocks have little to keep, so they run as before. Under
    `torch.compile` all blocks run as before, because its own partitioner decides what is kept.

    The model is changed in place and returned. Its structure stays, so the journal doesn't record this, and `load` doesn't bring it
    back.

    Args:
        sites: a pattern of the paths of blocks, or several.
        enabled: False turns recomputation off again.

    Raises:
        UnknownName: a pattern fits no block; InvalidInput: the model has no blocks.

    >>> from repfx.passes.expand import expand
    >>> recompute(expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb"))[0].recomputes
    True
    """
    blocks = blocks_at(model, sites)
    for block in blocks.values():
        block.recomputes = enabled
    Report("recompute", tuple(Edit("recompute", path) for path in blocks)).attach(model)
    return model

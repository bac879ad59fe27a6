"""Drop-path: while a model trains, the branches of its blocks leave out images at random, each branch others."""

from __future__ import annotations

from torch import nn

from repfx.blocks.block import RepBlock
from repfx.errors import InvalidInput


def set_drop_path(model: nn.Module, probability: float) -> None:
    """Let each branch of each block leave out images with this probability in training mode; 0 for none.

    What a branch gives for the other images is divided by 1 - `probability`, so the mean stays. The sites' own convs always run, and eval
    mode is not changed. A squeezed block, which runs as one conv, leaves nothing out.

    Args:
        probability: from 0 to less than 1.

    Raises:
        InvalidInput: the probability isn't possible.

    >>> import repfx
    >>> model = repfx.expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb")
    >>> set_drop_path(model, 0.08)
    >>> model[0].drop_path
    0.08
    """
    if not 0 <= probability < 1:
        raise InvalidInput(f"the probability of drop-path is {probability}; it must be from 0 to less than 1.")
    for module in model.modules():
        if isinstance(module, RepBlock):
            module.drop_path = probability

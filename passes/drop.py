"""`drop`: one branch leaves, what stays absorbs its kernel, the function is unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from repfx.activated_norm import joined
from repfx.block import RepBlock, block_at
from repfx.calibration import set_kernels_measured
from repfx.journaling import Action, record
from repfx.module_tree import set_submodule
from repfx.moments import set_kernel
from repfx.pipeline import verb
from repfx.reporting import Edit, Report


@dataclass(frozen=True)
class Drop(Action):
    """A branch left a block; with the last one the block became a conv again.

    Args:
        branch: its name in the block.
    """

    kind: ClassVar[str] = "drop"
    branch: str

    @classmethod
    def apply(cls, model: nn.Module, actions: Sequence[Drop], calibrate: Iterable[Any] | None) -> None:
        blocks = {action.site: block_at(model, action.site) for action in actions}
        for action in actions:
            blocks[action.site].require(action.branch)
        for action in actions:
            blocks[action.site].absorb(action.branch)
        try:
            if calibrate is not None:
                _measure(model, [block for block in blocks.values() if block.norm is not None], calibrate)
        finally:  # with the statistics of the sum at worst
            for site, block in blocks.items():
                if not block.branches:
                    collapse(model, site, block)
            record(model, actions)

    def __str__(self) -> str:
        return f"drop {self.site}.{self.branch}"


@verb
def drop(model: nn.Module, site: str, branch: str, *, calibrate: Iterable[Any] | None = None) -> nn.Module:
    """Remove one branch from a block; the site's own conv absorbs its kernel.

    The model is changed in place and returned; its parameters stay the same objects. In eval mode it computes the same; in training mode
    as far as the outputs of the two branches are uncorrelated, or, with `calibrate`, as far as the statistics of those data are those of
    a batch. When the last branch leaves, the block becomes a conv again, and its BatchNorm returns to where it stood.

    Args:
        site: path of the block.
        branch: name of the branch, as `repfx.sites` shows it.
        calibrate: inputs of the model, or a data loader, to measure the statistics of the origin's BatchNorm anew.

    Raises:
        UnknownName: no block at that path, or no branch of that name.

    >>> from repfx.passes.expand import expand
    >>> model = expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb")
    >>> list(drop(model, "0", "1xk")[0].branches)
    ['kx1']
    """
    Drop.apply(model, [Drop(site, branch)], calibrate)
    Report("drop", (Edit("drop", site, (f"{site}.{branch}",)),)).attach(model)
    return model


def _measure(model: nn.Module, blocks: list[RepBlock], batches: Iterable[Any]) -> None:
    places = [(block.conv, block.norm, block.origin_kernel()) for block in blocks]
    if places:
        set_kernels_measured(model, places, batches)


def collapse(model: nn.Module, site: str, block: RepBlock) -> None:
    """Put the conv of a block back in its place and the BatchNorm in its own; one that was made for the block goes into the conv."""
    if block.norm is not None and block.norm_path is None:
        set_kernel(block.conv, None, block.origin_kernel(), None)
    elif block.norm is not None and block.norm_path is not None:
        rest = model.get_submodule(block.norm_path)
        set_submodule(model, block.norm_path, joined(block.norm, rest))
    set_submodule(model, site, block.conv)

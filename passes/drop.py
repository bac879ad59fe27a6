"""`drop`: one branch leaves, what stays absorbs its kernel, the function is unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from repfx.block import RepBlock
from repfx.errors import InvalidInput, UnknownName
from repfx.journaling import Action, record
from repfx.module_tree import set_submodule
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
    def replay(cls, model: nn.Module, actions: Sequence[Drop]) -> None:
        for action in actions:
            drop(model, action.site, action.branch)


@verb
def drop(model: nn.Module, site: str, branch: str) -> nn.Module:
    """Remove one branch from a block; the site's own conv absorbs its kernel.

    The model is changed in place and returned; its parameters stay the same objects. In eval mode it computes the same. In training mode
    too, as far as the outputs of the two branches are uncorrelated. When the last branch leaves, the block becomes a conv again, and its
    BatchNorm returns to where it stood.

    Args:
        site: path of the block.
        branch: name of the branch, as `repfx.sites` shows it.

    Raises:
        UnknownName: no block at that path, or no branch of that name.

    >>> from repfx.passes.expand import expand
    >>> model = expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb")
    >>> list(drop(model, "0", "1xk")[0].branches)
    ['kx1']
    """
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, RepBlock)}
    if not blocks:
        raise InvalidInput(f"{type(model).__name__} has no blocks; repfx.expand makes them.")
    if site not in blocks:
        raise UnknownName("block at", site, blocks)
    block = blocks[site]
    block.absorb(branch)
    if not block.branches:
        _collapse(model, site, block)
    record(model, [Drop(site, branch)])
    Report("drop", (Edit("drop", site, (f"{site}.{branch}",)),)).attach(model)
    return model


def _collapse(model: nn.Module, site: str, block: RepBlock) -> None:
    set_submodule(model, site, block.conv)
    if block.norm_path is not None and block.norm is not None:
        set_submodule(model, block.norm_path, block.norm)

"""`gate`: give the paths of a block gates, by which a search decides which of them run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from repfx.blocks.block import ORIGIN, RepBlock
from repfx.blocks.gates import Gates, StraightThrough
from repfx.blocks.paths import block_at
from repfx.errors import InvalidInput
from repfx.records.journal import Action, apply
from repfx.records.report import Edit, Report
from repfx.rewriting.pipeline import verb


@dataclass(frozen=True)
class Gate(Action):
    """Give the branches of a block gates, all of them open.

    Args:
        style: style of the gates.
        origin: whether the site's own conv gets a gate, too.
    """

    kind: ClassVar[str] = "gate"
    style: str = "straight_through"
    origin: bool = False

    moves_kernels = False

    def do(self, model: nn.Module) -> None:
        block = block_at(model, self.site)
        if block.gates is not None:
            raise InvalidInput(f"{self.site!r} has gates already; repfx.passes.ungate removes them.")
        block.add_module("gate", _gates_of(block, self.style, origin=self.origin))

    def __str__(self) -> str:
        return f"gate {self.site}: {self.style}{', its own conv too' if self.origin else ''}"


def _gates_of(block: RepBlock, style: str, *, origin: bool) -> Gates:
    """Make gates for the branches of a block, and for its origin, too, if that is asked for; all are open."""
    if origin and style != StraightThrough.style:
        raise InvalidInput(f"the origin can have a {StraightThrough.style} gate, not a {style} one.")
    names = [name for name in block.paths if origin or name != ORIGIN]
    site = block.site
    return Gates(names, style, site.out_channels, site.dimensions, block.conv.weight).train(block.training)


@verb
def gate(model: nn.Module, site: str, style: str = "straight_through", *, origin: bool = False) -> nn.Module:
    """Give each branch of a block a gate with one learned number α; all gates begin open.

    The gates are in `block.gates`. A path whose gate is closed doesn't run, so it costs neither time nor memory. `block.gates.choose`
    opens and closes gates, for training mode and eval mode separately. Gates are part of the block's kernel, so `fuse`, `drop` and
    `ungate` absorb them.

    The model is changed in place and returned. In style ``straight_through`` (RepNAS) an open gate multiplies by 1, so the function
    stays. In style ``sigmoid`` (IRepNAS) the output of each branch is multiplied by σ(α) · σ(β), where β belongs to the whole block;
    this is a quarter at first.

    Args:
        site: path of the block.
        style: ``straight_through`` or ``sigmoid``.
        origin: give the site's own conv a gate, too; only for ``straight_through``.

    Raises:
        UnknownName: there is no block at that path, or no such style; InvalidInput: the block has gates already.

    >>> from repfx.passes.expand import expand
    >>> block = gate(expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb"), "0")[0]
    >>> block.gates.choose(["kx1"])
    >>> block.running
    ('origin', 'kx1')
    """
    apply(model, [Gate(site, style, origin)], None)
    Report("gate", (Edit("gate", site),)).attach(model)
    return model

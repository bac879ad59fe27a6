"""`ungate`: the gates of a block leave, what they multiply by stays in the branches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from repfx.block import ORIGIN, RepBlock, block_at
from repfx.branch import Branch
from repfx.errors import InvalidInput
from repfx.gates import Gates
from repfx.journaling import Action, record
from repfx.meaning import Layer, is_conv
from repfx.pipeline import verb
from repfx.reporting import Edit, Report
from repfx.stages import Scale


@dataclass(frozen=True)
class Ungate(Action):
    """The gates of a block left.

    Args:
        rests: whether the site's own conv, whose gate was closed, rests from now on.
    """

    kind: ClassVar[str] = "ungate"
    rests: bool = False

    @classmethod
    def apply(cls, model: nn.Module, actions: Sequence[Ungate], calibrate: Iterable[Any] | None) -> None:
        for action in actions:
            ungate(model, action.site)

    @classmethod
    def replay(cls, model: nn.Module, actions: Sequence[Ungate]) -> None:
        for action in actions:
            block = block_at(model, action.site)
            block.remove_gates()
            if action.rests:
                block.rest()

    def __str__(self) -> str:
        return f"ungate {self.site}{': its own conv rests' if self.rests else ''}"


@verb
def ungate(model: nn.Module, site: str) -> nn.Module:
    """Take the gates of a block away; branches absorb what they multiplied by, so that eval mode stays the same.

    Branches whose gates are closed have to be dropped before. A site's own conv whose gate is closed rests from now on: it stays in its
    place, to take over what branches leave, but neither runs nor learns.

    The model is changed in place and returned.

    Args:
        site: path of the block.

    Raises:
        UnknownName: no block at that path; InvalidInput: it has no gates, one of a branch is closed, or a branch has nothing that could
            absorb what its gate multiplies by.

    >>> from repfx.passes.expand import expand
    >>> from repfx.passes.gate import gate
    >>> model = gate(expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb"), "0", "sigmoid")
    >>> ungate(model, "0")[0].gates is None
    True
    """
    block = block_at(model, site)
    gates, rests = _gates(block, site)
    with torch.no_grad():
        factors = {branch: float(gates.factor_of(name)) for name, branch in block.branches.items()}
        places = [(_place(branch, site), factor) for branch, factor in factors.items() if factor != 1]
        for tensors, factor in places:
            for tensor in tensors:
                tensor.mul_(factor)
    block.remove_gates()
    if rests:
        block.rest()
    record(model, [Ungate(site, rests)])
    Report("ungate", (Edit("ungate", site),)).attach(model)
    return model


def _gates(block: RepBlock, site: str) -> tuple[Gates, bool]:
    """The gates, and whether the origin's is closed; raises if a closed branch would run again."""
    if block.gates is None:
        raise InvalidInput(f"{site!r} has no gates; repfx.passes.gate gives it some.")
    running = block.running_in(training=False)
    closed = [name for name in block.branches if name not in running]
    if closed:
        raise InvalidInput(f"{site!r} has closed branches, which would run again: drop {', '.join(closed)} first.")
    return block.gates, not block.rests and ORIGIN not in running


def _place(branch: Branch, site: str) -> list[torch.Tensor]:
    """The tensors at the end of a branch to which its output is proportional."""
    norm = branch.last_norm
    if norm is not None and norm.weight is not None and norm.bias is not None:
        return [norm.weight, norm.bias]
    last: Layer = [stage for stage in branch if not isinstance(stage, nn.Identity)][-1:]
    if last and (isinstance(last[0], Scale) or (is_conv(last[0]))) and last[0].weight is not None:
        bias = getattr(last[0], "bias", None)
        return [last[0].weight] if bias is None else [last[0].weight, bias]
    raise InvalidInput(
        f"the branch {branch.kind!r} of {site!r} has nothing that could absorb what its gate multiplies by."
    )

"""`gate`: give the paths of a block gates, by which a search decides which of them run. `ungate`: remove them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from repfx.algebra.layers import Layer, is_conv_or_linear
from repfx.blocks.block import ORIGIN, RepBlock
from repfx.blocks.branch import Chain
from repfx.blocks.gates import Gates, StraightThrough
from repfx.blocks.paths import block_at
from repfx.blocks.stages import Scale, batch_norm_in
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


# ---- ungate


@dataclass(frozen=True)
class Ungate(Action):
    """Remove the gates of a block.

    Args:
        rests: whether the site's own conv, whose gate was closed, rests afterwards.
    """

    kind: ClassVar[str] = "ungate"
    rests: bool = False

    moves_kernels = False

    def do(self, model: nn.Module) -> None:
        _remove(block_at(model, self.site), rests=self.rests)

    @classmethod
    def apply(cls, model: nn.Module, actions: Sequence[Ungate], calibrate: Iterable[Any] | None) -> None:
        now = [replace(action, rests=_rests(block_at(model, action.site), action.site)) for action in actions]
        super().apply(model, now, calibrate)

    @classmethod
    def replay(cls, model: nn.Module, actions: Sequence[Ungate]) -> None:
        # all gates of a base model are still open, so only the action knows what rests
        super().apply(model, actions, None)

    def __str__(self) -> str:
        return f"ungate {self.site}{': its own conv rests' if self.rests else ''}"


@verb
def ungate(model: nn.Module, site: str) -> nn.Module:
    """Remove the gates of a block; its branches absorb the gates' factors, so that the function stays in eval mode.

    A branch without parameters that its output is proportional to gets a `Scale` at its end. Branches whose gates are closed must be
    dropped first. If the gate of the site's own conv is closed, this conv rests afterwards: it stays in its place, so that it can
    absorb branches, but it neither runs nor learns.

    The model is changed in place and returned.

    Args:
        site: path of the block.

    Raises:
        UnknownName: there is no block at that path; InvalidInput: the block has no gates, or the gate of a branch is closed.

    >>> from repfx.passes.expand import expand
    >>> model = gate(expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb"), "0", "sigmoid")
    >>> ungate(model, "0")[0].gates is None
    True
    """
    apply(model, [Ungate(site)], None)
    Report("ungate", (Edit("ungate", site),)).attach(model)
    return model


@torch.no_grad()
def _remove(block: RepBlock, *, rests: bool) -> None:
    assert block.gates is not None
    for name, branch in block.branches.items():
        if block.gates.multiplies:
            _multiply(branch, block.gates.factor_of(name), block.conv.weight)
    del block.gate
    if rests:
        block.rest()


def _rests(block: RepBlock, site: str) -> bool:
    """Tell whether the origin's gate is closed; raise `InvalidInput` if a closed branch would run again."""
    if block.gates is None:
        raise InvalidInput(f"{site!r} has no gates; repfx.passes.gate adds them.")
    running = block.running_in(training=False)
    closed = [name for name in block.branches if name not in running]
    if closed:
        raise InvalidInput(f"{site!r} has closed branches, which would run again: drop {', '.join(closed)} first.")
    return not block.rests and ORIGIN not in running


def _multiply(branch: Chain, factor: Tensor, like: Tensor) -> None:
    """Multiply the output of a chain by `factor`."""
    stages: list[Layer] = [stage for stage in branch if not isinstance(stage, nn.Identity)]
    last: Layer = stages[-1] if stages else nn.Identity()
    last = batch_norm_in(last) or last
    if isinstance(last, RepBlock):
        for path in last.paths.values():
            _multiply(path, factor, like)
    elif isinstance(last, Scale) or is_conv_or_linear(last) or _is_affine(last):
        for tensor in (last.weight, getattr(last, "bias", None)):
            if tensor is not None:
                tensor.mul_(factor.to(tensor))
    else:
        scale = Scale(branch.site.out_channels, branch.site.dimensions, device=like.device, dtype=like.dtype)
        scale.weight.mul_(factor.to(scale.weight))
        branch.add_module("scale", scale.train(branch.training))


def _is_affine(module: Layer) -> bool:
    return batch_norm_in(module) is not None and module.weight is not None and module.bias is not None

"""`drop`: remove a branch from a block; what stays absorbs its kernel, so the function is unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

from torch import Tensor, nn

from repfx.algebra.moments import signs_of
from repfx.blocks.block import ORIGIN, RepBlock
from repfx.blocks.origin import absorb_branch, factor_of, origin_kernel, require_absorbable, write_origin
from repfx.blocks.own_fusing import collapse
from repfx.blocks.paths import block_at
from repfx.errors import InvalidInput
from repfx.measuring.calibration import PartialSum, measure_sums
from repfx.measuring.in_float64 import Inputs
from repfx.measuring.proof import proven
from repfx.records.journal import Action, apply, record
from repfx.records.report import Edit, Report
from repfx.rewriting.pipeline import verb


@dataclass(frozen=True)
class Drop(Action):
    """Remove a branch from a block. A block that loses its last branch becomes a conv again.

    Args:
        branch: name of the branch in the block.
        closed: whether the branch's gate was closed, so that there was nothing to absorb.
    """

    kind: ClassVar[str] = "drop"
    branch: str
    closed: bool = False

    @property
    def moves_kernels(self) -> bool:
        return not self.closed

    @classmethod
    def apply(cls, model: nn.Module, actions: Sequence[Drop], calibrate: Iterable[Any] | None) -> None:
        for action in actions:
            block = block_at(model, action.site)
            block.require_branch(action.branch)
            running = block.running_in(training=False)
            if action.closed and action.branch in running:
                raise InvalidInput(f"{action.site}.{action.branch} runs, so it can't be dropped as a closed branch.")
            if not running:
                raise InvalidInput(
                    f"no path of {action.site!r} runs, so no branch can be dropped: open one of its gates first."
                )
        _let_leave(model, actions, calibrate)

    @classmethod
    def replay(cls, model: nn.Module, actions: Sequence[Drop]) -> None:
        _let_leave(model, actions, None)  # all gates of a base model are still open, so they are not checked

    def __str__(self) -> str:
        return f"drop {self.site}.{self.branch}"


def _let_leave(model: nn.Module, actions: Sequence[Drop], calibrate: Iterable[Any] | None) -> None:
    leaving: dict[str, list[str]] = {}
    for action in actions:
        if action.closed:
            block_at(model, action.site).remove(action.branch)
        else:
            leaving.setdefault(action.site, []).append(action.branch)
    absorb(model, leaving, calibrate)
    for site in dict.fromkeys(action.site for action in actions if action.site not in leaving):
        block = block_at(model, site)
        if not block.branches:
            collapse(model, site, block)
    record(model, actions)


@verb
def drop(
    model: nn.Module,
    site: str,
    branch: str,
    *,
    calibrate: Iterable[Any] | None = None,
    example: Inputs | None = None,
) -> nn.Module:
    """Remove one branch from a block; the site's own conv absorbs its kernel.

    The model is changed in place and returned; its parameters stay the same objects. In eval mode it computes the same as before.
    In training mode it does so as far as the outputs of the branch and of the site's own conv are uncorrelated. With `calibrate`, it
    does so as far as the statistics of those data equal those of a batch.

    If the gate of the branch is closed, the branch is removed and nothing is absorbed. When the last branch is removed, the block
    becomes a conv again, and its BatchNorm returns to where it stood.

    Args:
        site: path of the block.
        branch: name of the branch, as `repfx.sites` shows it.
        calibrate: inputs of the model, or a data loader, on which the statistics of the origin's BatchNorm are measured anew.
        example: input of the model, as `check_equivalent` takes it: proves that the model computes what it did, in float64. Without it,
            nothing is compared.

    Raises:
        UnknownName: there is no block at that path, or no branch of that name.

    >>> from repfx.passes.expand import expand
    >>> model = expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb")
    >>> list(drop(model, "0", "1xk")[0].branches)
    ['kx1']
    """
    block = block_at(model, site)
    block.require_branch(branch)
    with proven("drop", model, example):
        apply(model, [Drop(site, branch, branch not in block.running_in(training=False))], calibrate)
    Report("drop", (Edit("drop", site, (f"{site}.{branch}",)),)).attach(model)
    return model


def absorb(model: nn.Module, leaving: Mapping[str, Sequence[str]], calibrate: Iterable[Any] | None) -> None:
    """Let the origins of blocks absorb branches. A block that loses its last branch becomes a conv again.

    Args:
        leaving: names of the branches to absorb, by the path of their block.

    Raises:
        UnknownName, InvalidInput: as for `drop`, or the data can't be used. Nothing has been changed then.
    """
    blocks = {site: block_at(model, site) for site in leaving}
    for site, block in blocks.items():
        for branch in leaving[site]:
            require_absorbable(block, branch)
            within = [other for other in blocks if other.startswith(f"{site}.{branch}.")]
            if within:
                raise InvalidInput(f"{within[0]!r} lies in {f'{site}.{branch}'!r}, which is dropped as a whole.")
    measured = [site for site, block in blocks.items() if block.norm is not None and calibrate is not None]
    sums = {site: list(_sums(blocks[site], leaving[site])) for site in measured}
    found = iter(measure_sums(model, [*chain(*sums.values())], calibrate) if calibrate is not None and sums else ())
    moments = {site: [next(found) for _ in sums[site]] for site in measured}
    for site, block in sorted(blocks.items(), key=lambda each: -each[0].count(".")):  # inner ones first, as measured
        for branch in leaving[site]:
            absorb_branch(block, branch)
        if site in moments:
            write_origin(block, origin_kernel(block), moments[site][0], within=moments[site][1:])
        if not block.branches:
            collapse(model, site, block)


def _sums(block: RepBlock, leaving: Sequence[str]) -> Iterator[PartialSum]:
    """Yield the sums that the origin must output after it has absorbed `leaving`, with the factors of eval mode (λ, gates).

    If the own conv has become a block, the sum for that block's origin comes second, and so on. Its variance alone matters.
    """
    running = block.running_in(training=False)
    factors = {name: float(block.factor_of(name)) for name in (ORIGIN, *leaving) if name in running}
    yield PartialSum(block, {block.paths[name]: factor for name, factor in factors.items()})
    size: Tensor | float = 1.0
    sign: Tensor | float = 1.0
    norm, inner = block.norm, block.inner
    while inner is not None and norm is not None:
        size, sign = size * _along_axes(factor_of(norm), inner), sign * _along_axes(signs_of(norm), inner)
        parts: dict[nn.Module, float | Tensor] = {inner.origin: size}
        parts |= {block.branches[name]: sign * factors[name] for name in leaving if name in factors}
        yield PartialSum(block, parts)
        norm, inner = inner.norm, inner.inner


def _along_axes(channels: Tensor, block: RepBlock) -> Tensor:
    return channels.reshape(-1, *(1,) * block.site.dimensions)

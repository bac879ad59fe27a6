"""`squeeze` and `unsqueeze`: what is linear runs as one conv, whose kernel is assembled from the parameters in each forward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from repfx.algebra.layers import is_batch_norm, is_conv, is_frozen_norm, takes_batch_statistics, template_of
from repfx.blocks.block import RepBlock
from repfx.blocks.paths import block_at
from repfx.errors import InvalidInput, RepfxError, UnknownName
from repfx.records.journal import Action, apply
from repfx.records.module_tree import fits
from repfx.records.report import Edit, Report, Skip
from repfx.rewriting.pipeline import verb
from repfx.rewriting.squeezed_regions import SqueezeRegions, held_in, regions_of

Statistics = Literal["frozen"]


@dataclass(frozen=True)
class Squeeze(Action):
    """A block runs as one conv.

    Args:
        frozen: whether its BatchNorms keep their statistics from now on.
    """

    kind: ClassVar[str] = "squeeze"
    frozen: bool = True

    moves_kernels = False

    def do(self, model: nn.Module) -> None:
        block_at(model, self.site).squeeze(hold_statistics=self.frozen)

    def __str__(self) -> str:
        return f"squeeze {self.site}{': its statistics stay' if self.frozen else ''}"


@dataclass(frozen=True)
class Unsqueeze(Action):
    """A block runs branch by branch again, and its BatchNorms take statistics in training mode."""

    kind: ClassVar[str] = "unsqueeze"

    moves_kernels = False

    def do(self, model: nn.Module) -> None:
        block_at(model, self.site).unsqueeze()

    def __str__(self) -> str:
        return f"unsqueeze {self.site}"


@verb
def squeeze(model: nn.Module, sites: str | Sequence[str] = "*", *, statistics: Statistics | None = None) -> nn.Module:
    """Let blocks run as one conv each, whose kernel is assembled from the trainable parameters inside forward.

    So a block trains at about the price of the conv that it becomes: one conv on the activations, and a few operations on weights.
    It is exact and differentiable, parameters and `state_dict` stay as they are, and `unsqueeze` is the way back.

    A block is one linear map where no BatchNorm in it takes its statistics from the batch: in eval mode; with branches that have
    none (`Spec(norm="scale")`, as the preset ``orepa``); and with `statistics="frozen"`, which lets BatchNorms keep
    the statistics that they have, in training mode too, while γ and β go on to be trained. Whenever a squeezed block isn't linear, it
    runs branch by branch, and so it does while a hook listens to something inside.

    The same holds of what is linear outside blocks, whoever wrote it: a conv and the BatchNorm behind it, or behind a block; the
    branches of timm's RepVGG, MobileOne or FastViT. There the module whose code was traced runs the graph of that code, as long as it
    is exact, and its own forward otherwise. What its code reads of globals and of its class, and what it counts, is taken as it was when it
    was squeezed. Pickled, it runs its own forward again, and BatchNorms outside blocks follow its mode again: squeeze it anew.

    The model is changed in place and returned.

    Args:
        sites: a pattern of the paths of blocks and convs, or several.
        statistics: ``frozen`` holds them in all that is squeezed; by default what takes the batch's in its mode is left alone.

    Raises:
        UnknownName: no block or conv at such a path, or `statistics` is something else; InvalidInput: nothing can be squeezed.

    >>> from repfx.passes.expand import expand
    >>> model = expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb")
    >>> from repfx.records.report import report
    >>> print(*report(squeeze(model)).skipped)
    Skip '0': 'origin.norm' takes its statistics from the batch (squeeze)
    >>> squeeze(model, statistics="frozen")[0].squeezed
    True
    """
    if statistics not in (None, *get_args(Statistics)):
        raise UnknownName("statistics", str(statistics), get_args(Statistics))
    hold = statistics == "frozen"
    blocks, convs = _blocks_and_convs(model, sites)
    refusals = {path: _refusal(block, hold=hold) for path, block in blocks.items()}
    actions = [Squeeze(path, hold) for path, reason in refusals.items() if reason is None]
    apply(model, actions, None)
    before = regions_of(model)
    known = [part for parts in before.values() for part in parts]
    parts = {*known, *_parts(model, {*convs, *blocks}, hold=hold)}
    SqueezeRegions.among(model, parts, {*held_in(model), *(parts if hold else ())} & _norms(model))
    after = regions_of(model)
    found = {path: parts for path, parts in after.items() if before.get(path) != parts}
    if not blocks and not after:
        raise InvalidInput(
            f"{type(model).__name__} has no block, which repfx.expand makes, and no conv whose BatchNorm keeps its statistics, "
            "as statistics='frozen' lets it."
        )
    edits = [*(Edit("squeeze", action.site) for action in actions), *(Edit("squeeze", *each) for each in found.items())]
    skips = [Skip(path, reason, "squeeze") for path, reason in refusals.items() if reason is not None]
    Report("squeeze", tuple(edits), tuple(skips)).attach(model)
    return model


@verb
def unsqueeze(model: nn.Module, sites: str | Sequence[str] = "*") -> nn.Module:
    """Let what was squeezed run as it did; BatchNorms whose statistics were held take those of each batch in training mode.

    The model is changed in place and returned.

    Args:
        sites: a pattern of the paths of blocks and convs, or several.

    Raises:
        UnknownName: no block or conv at such a path.

    >>> from repfx.passes.expand import expand
    >>> model = squeeze(expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb"), statistics="frozen")
    >>> unsqueeze(model)[0].squeezed
    False
    """
    blocks, convs = _blocks_and_convs(model, sites)
    squeezed = [path for path, block in blocks.items() if block.squeezed]
    regions = regions_of(model)
    loose = {path: parts for path, parts in regions.items() if {*parts} & {*convs, *blocks}}
    kept = {part for path, parts in regions.items() if path not in loose for part in parts}
    if loose:
        SqueezeRegions.among(model, kept, kept & {*held_in(model)})
    apply(model, [Unsqueeze(path) for path in squeezed], None)
    edits = dict.fromkeys([*squeezed, *loose])
    Report("unsqueeze", tuple(Edit("unsqueeze", path) for path in edits)).attach(model)
    return model


def _blocks_and_convs(model: nn.Module, sites: str | Sequence[str]) -> tuple[dict[str, RepBlock], list[str]]:
    """The blocks that patterns fit, inner ones too, and the convs and linear layers outside blocks.

    Raises:
        UnknownName: a pattern fits none of them.
    """
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, RepBlock)}
    convs = [path for path, module in _outside_blocks(model) if is_conv(module) or isinstance(module, nn.Linear)]
    patterns = [sites] if isinstance(sites, str) else sites
    for pattern in patterns:
        if pattern != "*" and not any(fits(path, pattern) for path in (*blocks, *convs)):
            raise UnknownName("block or conv at", pattern, [*blocks, *convs])
    chosen = {path for path in (*blocks, *convs) if any(fits(path, pattern) for pattern in patterns)}
    return {path: block for path, block in blocks.items() if path in chosen}, [path for path in convs if path in chosen]


def _outside_blocks(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules but those inside blocks, by path."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        yield path, child
        if not isinstance(child, RepBlock):
            yield from _outside_blocks(child, f"{path}.")


def _parts(model: nn.Module, chosen: Collection[str], *, hold: bool) -> Iterator[str]:
    """What regions may consist of: of convs and blocks those that were chosen, and all other layers that are linear in this mode."""
    for path, module in _outside_blocks(model):
        main = isinstance(module, (RepBlock, nn.Linear)) or is_conv(module)
        linear = module.squeezed if isinstance(module, RepBlock) else hold or not takes_batch_statistics(module)
        own = main or any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        if own and linear and not is_parametrized(module) and (path in chosen or not main):
            yield path


def _norms(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if is_batch_norm(module) and not is_frozen_norm(module)}


def _refusal(block: RepBlock, *, hold: bool) -> str | None:
    """Why a block isn't one linear map in the mode that it is in, its statistics held or not; or None."""
    part = None if hold else block.nonlinear_part
    if part is not None:
        return f"{part!r} takes its statistics from the batch"
    try:
        with torch.no_grad():
            block.equivalent_kernel(template_of(block.conv))
    except RepfxError as error:
        return str(error)
    return None

"""`squeeze` and `unsqueeze`: run linear parts as one conv, whose kernel is assembled from the parameters in each forward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from repfx.algebra.layers import is_batch_norm, is_conv_or_linear, is_frozen_norm, takes_batch_statistics, template_of
from repfx.blocks.block import RepBlock
from repfx.blocks.paths import block_at
from repfx.blocks.squeezed_form import lead, stop_leading
from repfx.errors import InvalidInput, RepfxError, UnknownName
from repfx.measuring.in_float64 import Inputs
from repfx.measuring.proof import proven
from repfx.records.journal import Action, apply
from repfx.records.module_tree import chosen
from repfx.records.report import Edit, Report, Skip
from repfx.rewriting.pipeline import verb
from repfx.rewriting.region_finder import reasons_against
from repfx.rewriting.squeezed_regions import SqueezeRegions, held_in, regions_of

Statistics = Literal["frozen"]


@dataclass(frozen=True)
class Squeeze(Action):
    """Let a block run as one conv.

    Args:
        frozen: whether its BatchNorms keep the statistics that they have.
    """

    kind: ClassVar[str] = "squeeze"
    frozen: bool = True

    moves_kernels = False

    def do(self, model: nn.Module) -> None:
        block_at(model, self.site).squeeze(hold_statistics=self.frozen)
        lead(model)

    def __str__(self) -> str:
        return f"squeeze {self.site}{': its statistics stay' if self.frozen else ''}"


@dataclass(frozen=True)
class Unsqueeze(Action):
    """Let a block run branch by branch again. In training mode, its BatchNorms take the statistics of each batch."""

    kind: ClassVar[str] = "unsqueeze"

    moves_kernels = False

    def do(self, model: nn.Module) -> None:
        block_at(model, self.site).unsqueeze()

    def __str__(self) -> str:
        return f"unsqueeze {self.site}"


@verb
def squeeze(
    model: nn.Module,
    sites: str | Sequence[str] = "*",
    *,
    statistics: Statistics | None = None,
    example: Inputs | None = None,
) -> nn.Module:
    """Let each block run as one conv, whose kernel is assembled from the trainable parameters in each forward pass.

    A squeezed block trains at about the price of the conv that it becomes: one conv on the activations, and a few operations on
    weights. This is exact and differentiable. Parameters and `state_dict` stay as they are, and `unsqueeze` undoes it.

    A block is one linear map while no BatchNorm in it takes its statistics from the batch. This holds

    - in eval mode;
    - for a block without BatchNorms (`Spec(norm="scale")`, as in the preset ``orepa``);
    - with `statistics="frozen"`: BatchNorms then keep the statistics that they have, in training mode too, while γ and β are still
      trained.

    Whenever a squeezed block isn't linear, or a hook listens to something inside it, it runs branch by branch.

    `squeeze` does the same with linear parts outside blocks, whoever wrote them: a conv and the BatchNorm behind it, a BatchNorm behind
    a block, or the branches of timm's RepVGG, MobileOne or FastViT. There, the module whose code was traced runs the graph of that code
    while this is exact, and its own forward otherwise. The graph holds what the code read from globals and from its class, and what
    it counted, as these were at the time of squeezing. A pickled module runs its own forward again, and BatchNorms outside blocks
    follow its mode again: squeeze it anew.

    The model is changed in place and returned.

    Args:
        sites: a pattern of the paths of blocks and convs, or several.
        statistics: ``frozen`` holds the BatchNorms' statistics in all that is squeezed. By default, whatever takes the statistics of the
            batch in its present mode is left alone.
        example: input of the model, as `check_equivalent` takes it: proves that the model computes what it did, in float64. Without it,
            nothing is compared.

    Raises:
        UnknownName: a pattern fits no block or conv, or `statistics` is something else; InvalidInput: nothing can be squeezed.

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
    with proven("squeeze", model, example, in_training=statistics is None):
        report = _squeeze(model, sites, hold=statistics == "frozen")
    report.attach(model)
    return model


def _squeeze(model: nn.Module, sites: str | Sequence[str], *, hold: bool) -> Report:
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
        raise InvalidInput(_nothing(model, parts, hold=hold))
    edits = [*(Edit("squeeze", action.site) for action in actions), *(Edit("squeeze", *each) for each in found.items())]
    skips = [Skip(path, reason, "squeeze") for path, reason in refusals.items() if reason is not None]
    return Report("squeeze", tuple(edits), tuple(skips))


@verb
def unsqueeze(model: nn.Module, sites: str | Sequence[str] = "*") -> nn.Module:
    """Let squeezed parts run as before; in training mode, BatchNorms whose statistics were held take those of each batch again.

    The model is changed in place and returned.

    Args:
        sites: a pattern of the paths of blocks and convs, or several.

    Raises:
        UnknownName: a pattern fits no block or conv.

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
    stop_leading(model)
    edits = dict.fromkeys([*squeezed, *loose])
    Report("unsqueeze", tuple(Edit("unsqueeze", path) for path in edits)).attach(model)
    return model


def _nothing(model: nn.Module, parts: Collection[str], *, hold: bool) -> str:
    """Say why there is nothing to squeeze, and what to do."""
    reasons = [f"{skip.path or type(model).__name__}: {skip.reason}" for skip in reasons_against(model, parts)]
    why = f" ({'; '.join(reasons[:4])}{'; …' if reasons[4:] else ''})" if reasons else ""
    advice = "" if hold else ", and statistics='frozen' lets BatchNorms keep their statistics"
    return (
        f"{type(model).__name__} has no block, and no layers outside blocks that could run as one conv{why}, so there is nothing to "
        f"squeeze: repfx.expand makes blocks{advice}."
    )


def _blocks_and_convs(model: nn.Module, sites: str | Sequence[str]) -> tuple[dict[str, RepBlock], list[str]]:
    """Return the blocks that the patterns fit, inner ones too, and the convs and linear layers outside blocks that they fit.

    Raises:
        UnknownName: a pattern fits none of them.
    """
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, RepBlock)}
    convs = [path for path, module in _outside_blocks(model) if is_conv_or_linear(module)]
    found = chosen(sites, [*blocks, *convs], "block or conv at")
    return {path: block for path, block in blocks.items() if path in found}, [path for path in convs if path in found]


def _outside_blocks(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules with their paths, except those inside blocks."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        yield path, child
        if not isinstance(child, RepBlock):
            yield from _outside_blocks(child, f"{path}.")


def _parts(model: nn.Module, chosen: Collection[str], *, hold: bool) -> Iterator[str]:
    """Yield the paths of the layers that regions may consist of.

    These are the convs, linear layers and blocks in `chosen`, and all other layers with tensors of their own; all must be linear in
    this mode.
    """
    for path, module in _outside_blocks(model):
        main = isinstance(module, RepBlock) or is_conv_or_linear(module)
        linear = module.squeezed if isinstance(module, RepBlock) else hold or not takes_batch_statistics(module)
        own = main or any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        if own and linear and not is_parametrized(module) and (path in chosen or not main):
            yield path


def _norms(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if is_batch_norm(module) and not is_frozen_norm(module)}


def _refusal(block: RepBlock, *, hold: bool) -> str | None:
    """Why a block isn't one linear map in its present mode, with its statistics held or not; None if it is one."""
    part = None if hold else block.nonlinear_part
    if part is not None:
        return f"{part!r} takes its statistics from the batch"
    try:
        with torch.no_grad():
            block.equivalent_kernel(template_of(block.conv))
    except RepfxError as error:
        return str(error)
    return None

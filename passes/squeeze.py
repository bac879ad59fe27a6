"""`squeeze` and `unsqueeze`: a block runs as one conv, whose kernel is assembled from the trainable parameters in each forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from repfx.block import RepBlock, block_at, blocks_at
from repfx.errors import RepfxError, UnknownName
from repfx.journaling import Action, record
from repfx.pipeline import verb
from repfx.reporting import Edit, Report, Skip

Statistics = Literal["frozen"]


@dataclass(frozen=True)
class Squeeze(Action):
    """A block runs as one conv.

    Args:
        frozen: whether its BatchNorms keep their statistics from now on.
    """

    kind: ClassVar[str] = "squeeze"
    frozen: bool = True

    @property
    def moves_kernels(self) -> bool:
        return False

    @classmethod
    def apply(cls, model: nn.Module, actions: Sequence[Squeeze], calibrate: Iterable[Any] | None) -> None:
        for action in actions:
            block_at(model, action.site).squeeze(hold_statistics=action.frozen)
        record(model, actions)

    def __str__(self) -> str:
        return f"squeeze {self.site}{': its statistics stay' if self.frozen else ''}"


@dataclass(frozen=True)
class Unsqueeze(Action):
    """A block runs branch by branch again, and its BatchNorms take statistics in training mode."""

    kind: ClassVar[str] = "unsqueeze"

    @property
    def moves_kernels(self) -> bool:
        return False

    @classmethod
    def apply(cls, model: nn.Module, actions: Sequence[Unsqueeze], calibrate: Iterable[Any] | None) -> None:
        for action in actions:
            block_at(model, action.site).unsqueeze()
        record(model, actions)

    def __str__(self) -> str:
        return f"unsqueeze {self.site}"


@verb
def squeeze(model: nn.Module, sites: str | Sequence[str] = "*", *, statistics: Statistics | None = None) -> nn.Module:
    """Let blocks run as one conv each, whose kernel is assembled from the trainable parameters inside forward.

    So a block trains at about the price of the conv that it becomes: one conv on the activations, and a few operations on weights.
    It is exact and differentiable, parameters and `state_dict` stay as they are, and `unsqueeze` is the way back.

    A block is one linear map where no BatchNorm in it takes its statistics from the batch: in eval mode; with branches that have
    none (`Spec(norm="scale")`, as the preset ``orepa``); and with `statistics="frozen"`, which lets the BatchNorms of the blocks keep
    the statistics that they have, in training mode too, while γ and β go on to be trained. Whenever a squeezed block isn't linear, it
    runs branch by branch, and so it does while a hook listens to something inside.

    The model is changed in place and returned.

    Args:
        sites: a pattern of the paths of blocks, or several.
        statistics: ``frozen`` holds them; by default blocks that use the batch's in the mode that they are in are left alone.

    Raises:
        UnknownName: no block at such a path, or `statistics` is something else; InvalidInput: no block at all.

    >>> from repfx.passes.expand import expand
    >>> model = expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb")
    >>> from repfx.reporting import report
    >>> print(*report(squeeze(model)).skipped)
    Skip '0': 'origin.norm' takes its statistics from the batch (squeeze)
    >>> squeeze(model, statistics="frozen")[0].squeezed
    True
    """
    if statistics not in (None, *get_args(Statistics)):
        raise UnknownName("statistics", str(statistics), get_args(Statistics))
    edits, skips, actions = [], [], []
    for path, block in blocks_at(model, sites).items():
        reason = _refusal(block, hold=statistics == "frozen")
        if reason is not None:
            skips.append(Skip(path, reason, "squeeze"))
            continue
        actions.append(Squeeze(path, statistics == "frozen"))
        edits.append(Edit("squeeze", path))
    Squeeze.apply(model, actions, None)
    Report("squeeze", tuple(edits), tuple(skips)).attach(model)
    return model


@verb
def unsqueeze(model: nn.Module, sites: str | Sequence[str] = "*") -> nn.Module:
    """Let blocks run branch by branch again; BatchNorms whose statistics were held take those of each batch in training mode.

    The model is changed in place and returned.

    Args:
        sites: a pattern of the paths of blocks, or several.

    Raises:
        UnknownName: no block at such a path; InvalidInput: no block at all.

    >>> from repfx.passes.expand import expand
    >>> model = squeeze(expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb"), statistics="frozen")
    >>> unsqueeze(model)[0].squeezed
    False
    """
    squeezed = {path: block for path, block in blocks_at(model, sites).items() if block.squeezed}
    Unsqueeze.apply(model, [Unsqueeze(path) for path in squeezed], None)
    Report("unsqueeze", tuple(Edit("unsqueeze", path) for path in squeezed)).attach(model)
    return model


def _refusal(block: RepBlock, *, hold: bool) -> str | None:
    """Why a block isn't one linear map in the mode that it is in, its statistics held or not; or None."""
    part = None if hold else block.nonlinear_part
    if part is not None:
        return f"{part!r} takes its statistics from the batch"
    try:
        with torch.no_grad():
            block.equivalent_kernel(block.conv.weight)
    except RepfxError as error:
        return str(error)
    return None

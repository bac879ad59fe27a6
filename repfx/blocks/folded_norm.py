"""`FoldedNorm`: what a conv remembers of the BatchNorm that it absorbed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from repfx.algebra.layers import Layer, is_frozen_norm
from repfx.algebra.moments import Moments
from repfx.records.notes import keep, kept

_ATTRIBUTE = "repfx_folded_norm"


@dataclass(frozen=True)
class FoldedNorm:
    """A BatchNorm that a conv has absorbed, for `restore` to put back.

    Args:
        conv, norm: the paths of both in the model they stood in.
        bias: whether the conv had a bias all the same.
        moments: of the conv's output in training mode, as far as they are known.
        synchronized: whether it was a SyncBatchNorm.
        frozen: its class, if it was one whose numbers are never trained.
    """

    conv: str
    norm: str
    eps: float
    momentum: float | None
    bias: bool
    moments: Moments | None = None
    synchronized: bool = False
    frozen: type[nn.Module] | None = None

    @classmethod
    def of(cls, norm: Layer, path: str, conv: str = "", *, bias: bool = False) -> FoldedNorm:
        """As it stands at a path, behind a conv."""
        frozen = type(norm) if is_frozen_norm(norm) else None
        momentum = None if frozen else norm.momentum
        return cls(
            conv, path, norm.eps, momentum, bias, Moments.after(norm), isinstance(norm, nn.SyncBatchNorm), frozen
        )


def folded_norm(conv: Layer) -> FoldedNorm | None:
    """The BatchNorm that a conv has absorbed, or None."""
    found = kept(conv, _ATTRIBUTE)
    return found if isinstance(found, FoldedNorm) else None


def remember_norm(conv: Layer, norm: FoldedNorm) -> None:
    """Let a conv carry the BatchNorm that it has absorbed."""
    keep(conv, _ATTRIBUTE, norm)


def forget_norm(conv: Layer) -> None:
    """Let a conv carry no absorbed BatchNorm any more."""
    if folded_norm(conv) is not None:
        delattr(conv, _ATTRIBUTE)

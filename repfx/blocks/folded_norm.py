"""`FoldedNorm`: a record, on a conv, of the BatchNorm that it absorbed."""

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
        conv, norm: paths of both in the model in which they stood.
        eps, momentum: settings of the BatchNorm.
        bias: whether the conv had a bias although a BatchNorm followed it.
        moments: moments of the fused conv's output in training mode, or None if they aren't known.
        synchronized: whether the BatchNorm was a SyncBatchNorm.
        frozen: class of the BatchNorm if its numbers are never trained, or None.
        missing: which of its parameters it doesn't have: "weight", "bias".
    """

    conv: str
    norm: str
    eps: float
    momentum: float | None
    bias: bool
    moments: Moments | None = None
    synchronized: bool = False
    frozen: type[nn.Module] | None = None
    missing: tuple[str, ...] = ()

    @classmethod
    def of(cls, norm: Layer, path: str, conv: str = "", *, bias: bool = False) -> FoldedNorm:
        """Read a BatchNorm at `path`, behind the conv at path `conv`."""
        frozen = type(norm) if is_frozen_norm(norm) else None
        momentum = None if frozen else norm.momentum
        synchronized = isinstance(norm, nn.SyncBatchNorm)
        missing = () if frozen else tuple(name for name in ("weight", "bias") if getattr(norm, name) is None)
        return cls(conv, path, norm.eps, momentum, bias, Moments.after(norm), synchronized, frozen, missing)


def folded_norm(conv: Layer) -> FoldedNorm | None:
    """Return the BatchNorm that a conv has absorbed, or None."""
    found = kept(conv, _ATTRIBUTE)
    return found if isinstance(found, FoldedNorm) else None


def remember_norm(conv: Layer, norm: FoldedNorm) -> None:
    """Record on a conv the BatchNorm that it has absorbed."""
    keep(conv, _ATTRIBUTE, norm)


def forget_norm(conv: Layer) -> None:
    """Delete the record of an absorbed BatchNorm from a conv."""
    if folded_norm(conv) is not None:
        delattr(conv, _ATTRIBUTE)

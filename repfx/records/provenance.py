"""Where a module that repfx made comes from, carried by the module itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from repfx.records.notes import keep, kept

_ATTRIBUTE = "repfx_provenance"


@dataclass(frozen=True)
class Provenance:
    """The origin of one module.

    Args:
        rules: what made it, in the order in which it was done.
        sources: paths, in the input model, of the modules that it was made from.
        equals: path of the module in the input model whose output in eval mode is this one's too, if there is one.
    """

    rules: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    equals: str | None = None


def attach(module: nn.Module, provenance: Provenance) -> None:
    """Let the module carry this origin, through copying and pickling, in place of any that it carried.

    >>> conv = nn.Conv2d(1, 1, 1)
    >>> attach(conv, Provenance(("fold_batch_norm",), ("conv", "bn"), "bn"))
    >>> provenance_of(conv).equals
    'bn'
    """
    keep(module, _ATTRIBUTE, provenance)


def provenance_of(module: nn.Module) -> Provenance | None:
    """The origin that a module carries, or None."""
    found = kept(module, _ATTRIBUTE)
    return found if isinstance(found, Provenance) else None

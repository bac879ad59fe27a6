"""The origin of a module that repfx made, carried by the module itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from repfx.records.notes import keep, kept

_ATTRIBUTE = "repfx_provenance"


@dataclass(frozen=True)
class Provenance:
    """The origin of one module.

    Args:
        rules: names of the rules that made the module, in the order in which they were applied.
        sources: paths, in the input model, of the modules that the module was made from.
        equals: path of the module in the input model that has the same output in eval mode, if there is one.
    """

    rules: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    equals: str | None = None


def attach(module: nn.Module, provenance: Provenance) -> None:
    """Let the module carry this origin, in place of any earlier one, through copying and pickling.

    >>> conv = nn.Conv2d(1, 1, 1)
    >>> attach(conv, Provenance(("fold_batch_norm",), ("conv", "bn"), "bn"))
    >>> provenance_of(conv).equals
    'bn'
    """
    keep(module, _ATTRIBUTE, provenance)


def provenance_of(module: nn.Module) -> Provenance | None:
    """Return the origin that a module carries, or None."""
    found = kept(module, _ATTRIBUTE)
    return found if isinstance(found, Provenance) else None

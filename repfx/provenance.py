"""Where a module that repfx made comes from, carried by the module itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

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
    setattr(module, _ATTRIBUTE, provenance)
    if isinstance(module, fx.GraphModule):
        module.meta[_ATTRIBUTE] = provenance  # all that deepcopy keeps of a GraphModule's own attributes


def provenance_of(module: nn.Module) -> Provenance | None:
    """The origin that a module carries, or None."""
    provenance = vars(module).get(_ATTRIBUTE)
    if provenance is None and isinstance(module, fx.GraphModule):
        provenance = module.meta.get(_ATTRIBUTE)
    return provenance

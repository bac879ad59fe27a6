"""`strips`: rows of signs beneath a chart that count the branches grown, the branches dropped and the other changes by epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from repfx.pages.changes import Changes, changes_of, count_of, when
from repfx.pages.columns import columns_of
from repfx.training.runs.history import Epoch


@dataclass(frozen=True)
class Sign:
    """One sign: the changes of one kind in one column of epochs.

    Args:
        epochs: the epochs in which there were changes.
        text: a symbol with the number of changes, which is shown.
        title: the changes in words, for the tooltip.
    """

    epochs: tuple[int, ...]
    text: str
    title: str


def _count_others(changes: Changes) -> int:
    return sum(map(len, changes.others.values()))


_SIGNS: dict[str, tuple[str, Callable[[Changes], int]]] = {
    "grown": ("+", lambda changes: count_of(changes.grown)),
    "dropped": ("×", lambda changes: count_of(changes.dropped)),
    "other": ("◆", _count_others),
}


def strips(epochs: Sequence[Epoch], most: int) -> dict[str, list[Sign]]:
    """Return the rows of signs by name, each with at most `most` signs. Empty rows are left out."""
    columns = [[changes_of(epoch) for epoch in column.epochs] for column in columns_of(epochs, most)]
    found = {name: [sign for column in columns if (sign := _sign(name, column))] for name in _SIGNS}
    return {name: signs for name, signs in found.items() if signs}


def _sign(name: str, column: Sequence[Changes]) -> Sign | None:
    symbol, count = _SIGNS[name]
    counts = {changes.epoch: count(changes) for changes in column if count(changes)}
    told = ", ".join(f"{number} {when(epoch)}" for epoch, number in counts.items())
    return Sign(tuple(counts), f"{symbol}{sum(counts.values())}", f"{name}: {told}") if counts else None

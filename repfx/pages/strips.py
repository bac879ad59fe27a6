"""Signs beneath a chart: how many branches grew, were dropped, and what else was done, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from repfx.pages.changes import Changes, changes_of, count_of, when
from repfx.pages.columns import columns_of
from repfx.training.history import Epoch


@dataclass(frozen=True)
class Sign:
    """What was done in some epochs: as it is shown, and in words."""

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
    """Rows of at most so many signs, by their names; those that would be empty are left out."""
    columns = [[changes_of(epoch) for epoch in column.epochs] for column in columns_of(epochs, most)]
    found = {name: [sign for column in columns if (sign := _sign(name, column))] for name in _SIGNS}
    return {name: signs for name, signs in found.items() if signs}


def _sign(name: str, column: Sequence[Changes]) -> Sign | None:
    symbol, count = _SIGNS[name]
    counts = {changes.epoch: count(changes) for changes in column if count(changes)}
    told = ", ".join(f"{number} {when(epoch)}" for epoch, number in counts.items())
    return Sign(tuple(counts), f"{symbol}{sum(counts.values())}", f"{name}: {told}") if counts else None

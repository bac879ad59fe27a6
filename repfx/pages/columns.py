"""`Column`: one or several epochs of a run that a figure shows in one column."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from repfx.training.runs.history import Epoch


@dataclass(frozen=True)
class Column:
    """Consecutive epochs. A figure shows the state of the last one, and the changes of all of them."""

    epochs: tuple[Epoch, ...]

    @property
    def last(self) -> Epoch:
        """The epoch whose state is shown."""
        return self.epochs[-1]

    def __str__(self) -> str:
        first, last = self.epochs[0].epoch, self.last.epoch
        return str(last) if first == last else f"{first}–{last}"


def columns_of(epochs: Sequence[Epoch], most: int) -> tuple[Column, ...]:
    """Divide epochs into at most `most` columns, or into two if `most` is smaller.

    The first epoch has a column of its own. Each further column has equally many epochs, a round number; the last may have fewer.

    >>> [str(column) for column in columns_of([Epoch(number) for number in range(13)], 8)]
    ['0', '1–2', '3–4', '5–6', '7–8', '9–10', '11–12']
    """
    rest = epochs[1:]
    step = next(step for step in _round_numbers() if math.ceil(len(rest) / step) + 1 <= max(most, 2))
    groups = [epochs[:1], *(rest[first : first + step] for first in range(0, len(rest), step))]
    return tuple(Column(tuple(group)) for group in groups if group)


def _round_numbers() -> Iterator[int]:
    yield from (1, 2, 5, 10, 15, 20, 25, 30, 40)
    yield from count(50, 50)

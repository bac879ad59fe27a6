"""`Scale`: a map from values to places on a page; `Unit`; and round numbers to mark on an axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Scale:
    """A linear scale: `low` is drawn at `start`, `high` at `end`. If the two are equal, every value is drawn in the middle."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        if self.low == self.high:
            return (self.start + self.end) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Unit:
    """A unit in which an axis tells its values.

    Args:
        name: the text behind a number, which may be empty.
        size: the value that is one of this unit.
        digits: how many digits a value is told with.
    """

    name: str
    size: float = 1.0
    digits: int = 3

    def text(self, value: float) -> str:
        """Write a value in this unit.

        >>> Unit("min", 60).text(250), Unit("%", 0.01, 4).text(0.98765)
        ('4.17 min', '98.77 %')
        """
        return f"{value / self.size:.{self.digits}g} {self.name}".strip()

    def mark(self, number: float) -> str:
        """Write a round number of this unit beside an axis. Zero stands without the unit."""
        return f"{number:.6g} {self.name}".strip() if number else "0"


SHARES = (Unit("%", 0.01, 4),)
NUMBERS = (Unit(""),)
COUNTS = (Unit(""), Unit("k", 1e3), Unit("M", 1e6), Unit("G", 1e9))
TIMES = (Unit("ms", 1e-3), Unit("s"), Unit("min", 60), Unit("h", 3600))


def unit_for(values: Iterable[float], units: Sequence[Unit]) -> Unit:
    """Return the largest unit that the greatest value reaches, or the smallest unit if it reaches none.

    >>> unit_for([20, 250], TIMES).name, unit_for([], TIMES).name
    ('min', 'ms')
    """
    most = max(map(abs, values), default=0.0)
    return next((unit for unit in reversed(units) if unit.size <= most), units[0])


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places between `low` and `high` apart, so that they keep a gap and their order. The gap is smaller if there is no room.

    >>> spread([11, 10, 40], 5, 0, 50), spread([49, 50], 5, 0, 50), spread([1, 2, 3], 5, 0, 6)
    ([15, 10, 40], [45, 50], [1, 3.0, 5.0])
    """
    gap = min(gap, (high - low) / max(len(places), 1))
    order = sorted(range(len(places)), key=lambda index: places[index])
    found = list(places)
    for before, index in pairwise(order):
        found[index] = max(found[index], found[before] + gap)
    limit = high
    for index in reversed(order):
        found[index] = min(found[index], limit)
        limit = found[index] - gap
    return found


def round_marks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Return at most `most` round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten.

    If `low` and `high` are equal, that value is the only mark. `whole` allows whole numbers only.

    >>> round_marks(0, 0.97, 5), round_marks(0, 18, 6, whole=True), round_marks(3, 3, 5)
    ([0.0, 0.2, 0.4, 0.6, 0.8], [0, 5, 10, 15], [3])
    """
    if low == high:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = (factor * power for factor in (1, 2, 5, 10, 20, 50, 100))
    step = next(step for step in steps if _count(low, high, step) <= most and not (whole and step < 1))
    first = math.ceil(low / step - 1e-9)
    marks = [round((first + index) * step, 12) for index in range(_count(low, high, step))]
    return [int(mark) for mark in marks] if whole else marks


def span(values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    """Return the range to draw: from the least value to the greatest, or from 0 if `from_zero` and no value is negative.

    If both ends would be equal, the range is a little wider.
    """
    low, high = min([*values, 0.0] if from_zero else values), max(values)
    if low == high:
        margin = abs(high) * 0.05 or 1.0
        return (low if from_zero else low - margin), high + margin
    return low, high


def _count(low: float, high: float, step: float) -> int:
    return math.floor(high / step + 1e-9) - math.ceil(low / step - 1e-9) + 1

"""`Scale`: a map from values to places on a page, and round numbers to mark on an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


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

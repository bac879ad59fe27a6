"""`Timing`: the seconds that something took in each of several runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """The seconds of each run. Half of the runs took from `low` to `high`.

    >>> timing = Timing((1.0, 2.0, 3.0, 4.0, 10.0))
    >>> timing.median, timing.low, timing.high
    (3.0, 2.0, 4.0)
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """The first quartile."""
        return self._quartiles[0]

    @property
    def high(self) -> float:
        """The third quartile."""
        return self._quartiles[2]

    @property
    def _quartiles(self) -> list[float]:
        if len(self.seconds) == 1:
            return [self.seconds[0]] * 3
        return statistics.quantiles(self.seconds, n=4, method="inclusive")

    @property
    def text(self) -> str:
        """The median with the quartiles, in milliseconds.

        >>> Timing((0.001, 0.002, 0.003)).text
        '2.00 (1.50–2.50) ms'
        """
        return f"{_short(self.median)} ({_short(self.low)}–{_short(self.high)}) ms"

    def as_dict(self) -> dict[str, float]:
        """Return the median and the quartiles in seconds, for JSON."""
        return {"median": self.median, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{_short(self.median)} ms"


def _short(seconds: float) -> str:
    """Format milliseconds with three digits."""
    return f"{seconds * 1e3:.{3 if seconds < 1e-3 else 2 if seconds < 1e-2 else 1}f}"


def total(timings: Iterable[Timing]) -> Timing:
    """Add timings run by run."""
    return Timing(tuple(map(sum, zip(*(timing.seconds for timing in timings)))))

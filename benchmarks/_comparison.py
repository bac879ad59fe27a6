"""Compare candidates with a baseline by ratios turn by turn, so that a slow moment of the machine affects both sides."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """The median of a ratio over all turns, and the interval that holds the true median in 95 of 100 runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float], baseline: Sequence[float]) -> Ratio:
        """Return the ratio of the times of each turn; turn k of `times` is divided by turn k of `baseline`.

        >>> Ratio.of([2.0, 4.0, 3.0], [1.0, 2.0, 3.0])
        Ratio(median=2.0, low=1.0, high=2.0)
        """
        ratios = sorted(time / base for time, base in zip(times, baseline, strict=True))
        # The number of turns below the median is binomial: n / 2 ± 1.96 √n / 2.
        spread = 0.98 * math.sqrt(len(ratios))
        first = max(math.floor(len(ratios) / 2 - spread), 0)
        last = min(math.ceil(len(ratios) / 2 + spread), len(ratios) - 1)
        return cls(statistics.median(ratios), ratios[first], ratios[last])

    def rounded(self, digits: int = 4, name: str = "ratio") -> dict[str, float]:
        """Return what a row of results says of the ratio.

        >>> Ratio(0.51234, 0.5, 0.55).rounded(2)
        {'ratio': 0.51, 'low': 0.5, 'high': 0.55}
        """
        return {name: round(self.median, digits), "low": round(self.low, digits), "high": round(self.high, digits)}


@dataclass(frozen=True)
class Measurement:
    """One candidate: median seconds per call, and its ratio to the baseline."""

    candidate: str
    seconds: float
    ratio: Ratio


def compare(times: Mapping[str, Sequence[float]], baseline: str) -> list[Measurement]:
    """Compare every candidate with the one named `baseline`."""
    base = times[baseline]
    return [Measurement(name, statistics.median(own), Ratio.of(own, base)) for name, own in times.items()]

"""Rows of `benchmarks/accuracy.py`, compared seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t

Row = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences and its interval of 95 %; a single pair has no interval."""

    mean: float
    spread: float | None

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Difference:
        """Return the difference of paired values, for example one pair for each seed.

        >>> Difference.of([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]).mean
        2.0
        """
        pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
        if len(pairs) < 2:
            return cls(statistics.fmean(pairs), None)
        error = statistics.stdev(pairs) / len(pairs) ** 0.5
        return cls(statistics.fmean(pairs), float(t.ppf(0.975, len(pairs) - 1)) * error)

    @classmethod
    def between(cls, ours: dict[int, Row], theirs: dict[int, Row]) -> Difference | None:
        """Return the difference in accuracy over the seeds that both have, in percentage points; None if they share no seed."""
        seeds = [seed for seed in ours if seed in theirs]
        return cls.of(*([accuracy_of(rows[seed]) for seed in seeds] for rows in (ours, theirs))) if seeds else None

    @property
    def shown(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.spread is not None and abs(self.mean) > self.spread

    def __str__(self) -> str:
        interval = "" if self.spread is None else f" ± {self.spread:.2f}"
        return f"{self.mean:+.2f}{interval}"


def by_seed(rows: Sequence[Row], method: str) -> dict[int, Row]:
    """Return the rows of a method by their seeds."""
    return {row["seed"]: row for row in rows if row["method"] == method}


def accuracy_of(row: Row) -> float:
    """Return the accuracy of the fused model, in percent."""
    return 100 * float(row["accuracy"]["fused"])

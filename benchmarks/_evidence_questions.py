"""The purpose of the long scale: the questions, the comparisons that answer them, and when a comparison is an answer.

All of this was fixed in docs/evidence-plan.md before the first result.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import combinations

import numpy
from scipy.stats import rankdata

from benchmarks._paired import Difference, Row, by_seed

LEAST_SEEDS = 3
MARGIN = 0.5  # percentage points
# a method, what it is compared with, and whether the answer rests on this pair
Pair = tuple[str, str, bool]
QUESTIONS: dict[str, tuple[Pair, ...]] = {
    "Do branches gain at convergence?": (
        ("RepVGG", "plain", True),
        ("DBB", "plain", True),
        ("ACB", "plain", False),
        ("OREPA", "plain", False),
        ("odbb", "plain", False),
        ("ireps", "plain", False),
    ),
    "Does growing (DyRep) beat full blocks at its cost?": (
        ("DyRep", "odbb, at DyRep's cost", True),
        ("DyRep", "plain, 2.5 times", False),
        ("DyRep", "odbb", False),
        ("DyRep", "DyRep at random", False),
        ("DyRep by snip", "DyRep at random", False),
    ),
    "Does any search beat the static preset?": (
        ("RepNAS, retrained", "odbb", True),
        ("DES", "ireps", True),
        ("RepNAS, retrained", "random architecture", False),
        ("RepNAS", "plain, clipped", False),
        ("RepNAS", "RepNAS, retrained", False),
    ),
    "Does RepAn gain over RepVGG trained as long?": (
        ("RepAn", "RepVGG", True),
        ("RepAn, distilled", "RepVGG, distilled", True),
        ("RepVGG, distilled", "RepVGG", False),
    ),
    "Is plain where it stops improving?": (
        ("plain, 2.5 times", "plain", True),
        ("plain, 5 times", "plain, 2.5 times", True),
    ),
}
SEARCHES = {"RepNAS": "α", "DES": "σ(α) · σ(β)"}


def answers(rows: Sequence[Row]) -> str:
    """Write the answers that the rows of one data set give so far."""
    parts = ["#### The questions", "Comparisons in bold answer the question; [the plan](evidence-plan.md) says how."]
    for question, pairs in QUESTIONS.items():
        lines = [("comparison", "seeds", "difference", "answer"), ("---",) * 4, *(_line(rows, *pair) for pair in pairs)]
        parts += [question, "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    parts += ["Do the rankings of α agree between seeds?", "\n".join(f"- {_told(rows, method)}" for method in SEARCHES)]
    return "\n\n".join(parts)


def _line(rows: Sequence[Row], method: str, other: str, decides: bool) -> tuple[str, str, str, str]:
    ours, theirs = by_seed(rows, method), by_seed(rows, other)
    difference, common = Difference.between(ours, theirs), len(ours.keys() & theirs.keys())
    told = "missing" if difference is None else str(difference)
    mark = "**" if decides else ""
    return f"{mark}{method} − {other}{mark}", str(common), told, answer(difference, common)


def answer(difference: Difference | None, seeds: int) -> str:
    """Say what an interval shows.

    >>> [answer(Difference(mean, spread), 3) for mean, spread in ((0.9, 0.5), (0.1, 0.3), (0.4, 0.5), (-0.8, 0.5))]
    ['a gain', 'no gain of half a point', 'open', 'a loss']
    """
    if difference is None or difference.spread is None or seeds < LEAST_SEEDS:
        return "not done"
    if difference.shown:
        return "a gain" if difference.mean > 0 else "a loss"
    return "no gain of half a point" if difference.mean + difference.spread < MARGIN else "open"


def _told(rows: Sequence[Row], method: str) -> str:
    importances = [found for row in by_seed(rows, method).values() if (found := importance_of(row))]
    if len(importances) < LEAST_SEEDS:
        return f"{method}: not done"
    parts = [f"{method}, {SEARCHES[method]} of {len(importances[0])} paths, {len(importances)} seeds"]
    for name, values in (
        ("all paths", importances),
        ("beyond their kinds' means", list(map(_within_kinds, importances))),
    ):
        correlation, by_chance = agreement([list(each.values()) for each in values])
        verdict = "they agree" if correlation > by_chance else "no more than by chance"
        parts.append(f"{name}: ρ = {correlation:.2f}, by chance up to {by_chance:.2f}: {verdict}")
    return "; ".join(parts)


def importance_of(row: Row) -> dict[tuple[str, str], float]:
    """Return the importance that a search has learned for each path, by site and kind; empty if it has learned none."""
    architecture = row.get("search", row).get("architecture", {})
    return {
        (site, kind): value
        for site, code in architecture.items()
        for kind, value in zip(["origin", *code["branches"]], code["importance"])
        if value is not None
    }


def _within_kinds(importance: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    kinds: dict[str, list[float]] = {}
    for (_, kind), value in importance.items():
        kinds.setdefault(kind, []).append(value)
    return {path: value - statistics.fmean(kinds[path[1]]) for path, value in importance.items()}


def agreement(values: Sequence[Sequence[float]], draws: int = 2000) -> tuple[float, float]:
    """Return the mean rank correlation (Spearman) of all pairs of seeds, and what 97.5 % of random rankings stay below."""
    ranks = numpy.stack([rankdata(each) for each in values])
    numbers = numpy.random.default_rng(0)
    by_chance = [_mean_correlation(numbers.permuted(ranks, axis=1)) for _ in range(draws)]
    return _mean_correlation(ranks), float(numpy.quantile(by_chance, 0.975))


def _mean_correlation(ranks: numpy.ndarray) -> float:
    correlations = numpy.corrcoef(ranks)
    return statistics.fmean(float(correlations[pair]) for pair in combinations(range(len(ranks)), 2))

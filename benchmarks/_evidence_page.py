"""The page `docs/evidence.md`, written from the rows of `benchmarks/accuracy.py`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t

Row = dict[str, Any]
PLAIN = "plain"
# top-1 in percent, each by its own paper's recipe
PAPERS: dict[tuple[str, str], dict[str, str]] = {
    ("vgg16", "cifar10"): {
        "plain": "94.68 (DyRep), 93.95 (DBB)",
        "DBB": "94.62",
        "DyRep, Rep": "95.03",
        "DyRep, Rep + Dep": "95.22",
    },
    ("vgg16", "cifar100"): {"plain": "74.05 (DBB)", "DBB": "75.72"},
}

INTRODUCTION = """\
# Evidence

<!-- written by `python -m benchmarks.accuracy --page docs/evidence.md`; change that instead -->

What the methods give when all of them train the same net on the same data, from the same seeds, with the same recipe. Accuracy is that
of the fused model, in percent, mean ± standard deviation over the seeds. The difference is to *plain*, seed by seed, with the interval that
holds its mean in 95 of 100 repetitions, by Student's t; where it contains 0, nothing is shown. Cost is the multiply-adds of the whole
training, a teacher's included, relative to plain's; *plain, longer* takes as many as the dearest method. *Flips* are test images that the
file in onnxruntime puts into another class than the model before it was fused.
"""


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences and its interval of 95 %; without one for a single pair."""

    mean: float
    spread: float | None

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Difference:
        """Seed by seed.

        >>> Difference.of([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]).mean
        2.0
        """
        pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
        if len(pairs) < 2:
            return cls(statistics.fmean(pairs), None)
        error = statistics.stdev(pairs) / len(pairs) ** 0.5
        return cls(statistics.fmean(pairs), float(t.ppf(0.975, len(pairs) - 1)) * error)

    @property
    def shown(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.spread is not None and abs(self.mean) > self.spread

    def __str__(self) -> str:
        interval = "" if self.spread is None else f" ± {self.spread:.2f}"
        return f"{self.mean:+.2f}{interval}"


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["scale"], row["data"]), []).append(row)
    return "\n".join([INTRODUCTION, *(_group(*key, group) for key, group in sorted(groups.items()))])


def _group(scale: str, data: str, rows: list[Row]) -> str:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    plain = {row["seed"]: row for row in rows if row["method"] == PLAIN}
    papers = PAPERS.get((scale, data), {})
    head = ["method", "seeds", "accuracy", "difference to plain", "cost", "flips", *(["the paper"] if papers else [])]
    lines = [head, ["---"] * len(head)]
    better: list[str] = []
    worse: list[str] = []
    for method in methods:
        own = {row["seed"]: row for row in rows if row["method"] == method and row["seed"] in plain}
        accuracy = [100 * row["accuracy"]["fused"] for row in own.values()]
        difference = Difference.of(accuracy, [100 * plain[seed]["accuracy"]["fused"] for seed in own])
        if difference.shown:
            (better if difference.mean > 0 else worse).append(method)
        deviation = f" ± {statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else ""
        cost = statistics.fmean(row["training_macs"] / plain[seed]["training_macs"] for seed, row in own.items())
        flips, tests = (sum(f(row) for row in own.values()) for f in (_flips, lambda row: row["test_images"]))
        lines.append(
            [
                method,
                str(len(own)),
                f"{statistics.fmean(accuracy):.2f}{deviation}",
                "" if method == PLAIN else str(difference),
                f"{cost:.2f}",
                f"{flips} of {tests}",
                *([papers.get(method, "")] if papers else []),
            ]
        )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    first = rows[0]
    config = first["config"]["training"]
    setting = (
        f"Net `{first['config']['model']['name']}`, {first['images']} training images of {data}, {config['epochs']} epochs, "
        f"{first['hardware']}, torch {first['torch']}."
    )
    return f"## {scale}, {data}\n\n{setting}\n\n{table}\n\n{_conclusion(better, worse)}\n"


def _flips(row: Row) -> int:
    return int(row["flips"]["onnxruntime"])


def _conclusion(better: list[str], worse: list[str]) -> str:
    parts = [
        f"Better than plain beyond chance: {', '.join(better) or 'none'}.",
        f"Worse: {', '.join(worse) or 'none'}.",
        "Of the others nothing can be said from these runs.",
    ]
    return " ".join(parts)

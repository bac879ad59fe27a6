"""The page `docs/evidence.md`, written from the rows of `benchmarks/accuracy.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import torch
from scipy.stats import t

import repfx
from repfx.measuring.cost import count_macs
from repfx.training.models import ModelReference

Row = dict[str, Any]
PLAIN, AS_LONG, LONGER = BASES = ("plain", "plain, 2.5 times", "plain, longer")  # from the shortest on
EQUAL = "plain at equal cost"
NEARLY = 1.15  # times the multiply-adds of the plain net count as equal cost
# differences to their own baselines, in percent, each on the paper's net and by its recipe
PAPERS: dict[str, dict[str, str]] = {
    "cifar10": {
        "ACB": "+0.30 (VGG-16, in RepNAS)",
        "DBB": "+0.67 (VGG-16), +0.62 (in RepNAS)",
        "DyRep, Rep": "+0.35 (VGG-16)",
        "DyRep, Rep + Dep": "+0.54 (VGG-16)",
        "RepNAS": "+0.85 (VGG-16)",
        "random search": "+0.08 (VGG-16, in RepNAS)",
        "DES": "+1.53 (VGG-16), +0.40 (ResNet-18)",
    },
    "cifar100": {
        "DBB": "+1.67 (VGG-16)",
        "RepAn": "+1.32 (RepVGG-A1, ¼ width)",
        "RepAn, distilled": "+6.38 (RepVGG-A1, ¼ width)",
        "distilled": "+2.34 (RepVGG-A1, ¼ width)",
    },
}
SCALES = {
    "cpu": """\
A VGG of seven convs with 8 to 64 channels, 10,000 of the 50,000 training images, 10 epochs: what two CPU cores can do for all methods
and several seeds. The scale, the recipe and the methods' settings were fixed before the first result was seen. Three things were added
later: that what random search and DES find is trained once more from the beginning, as in their papers, after the first run of random
search had shown that the four epochs left behind a search are too few; *RepNAS, retrained*, which its paper doesn't do, and *plain, 2.5
times*, after two seeds of CIFAR-10.

It shows which methods learn more in a short training of a small net. It can't show what they give in one of hundreds of epochs, where
plain nets are close to what they can reach, nor on nets of real width; a schedule of which the papers have forty adjustments has seven
here, a cycle of RepAn five epochs, and a search learns its gates in five. So where a method misses its paper's gain here, the paper
isn't refuted, and where it exceeds it, the paper isn't confirmed. Where gains differ from the papers':

- RepNAS trains on with the weights that its search leaves behind, as in its paper. Here that is a net whose paths were drawn at random for
  six of ten epochs, and then has four left, at rates that fall: the recipe, not the architecture, for the same search retrained is the
  row below. *Random search* before it was retrained stood where RepNAS does.
- DyRep grows blocks one by one: over the ten epochs it runs less than two thirds of the multiply-adds of full blocks.
- The teacher is no ResNet-101 but a net of the same kind, twice as wide, and trained as shortly.
- A net that is far from what it can reach gains more by longer training than by anything else, so a method that costs a multiple of the
  plain net's training is hard put to beat it at equal cost. OREPA, RepVGG and RepAn cost hardly more multiply-adds than the plain net.""",
}

INTRODUCTION = """\
# Evidence

<!-- written by `python -m benchmarks.accuracy --page docs/evidence.md`; change that instead -->

What the methods give when all of them train the same net on the same data, from the same seeds, with the same recipe. Accuracy is that
of the fused model on all test images, in percent, mean ± standard deviation over the seeds. *Against …* are differences seed by seed,
with the interval that holds their mean in 95 of 100 repetitions, by Student's t; where it contains 0, nothing is shown. With some
fifteen methods, about one interval of a column would leave 0 out by chance alone. *Cost* is the multiply-adds of the whole training, a
search's and a teacher's included, and *time* the processor's, both relative to plain's; *plain, 2.5 times* takes as many multiply-adds
as most methods, *plain, longer* as many as the dearest one. *Plain at equal cost* is the first of *plain*, *plain, 2.5 times* and
*plain, longer* of whose cost a method takes no more than 1.15 times. *Flips* are test images that the file in onnxruntime puts into another
class than the model before it was fused. What papers report are differences to their own baselines.
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
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row["scale"], {}).setdefault(row["data"], []).append(row)
    parts = [INTRODUCTION.rstrip()]
    for scale, by_data in sorted(groups.items()):
        parts += [f"## {scale}", *([SCALES[scale]] if scale in SCALES else [])]
        parts += [_group(data, group) for data, group in sorted(by_data.items())]
    return "\n\n".join(parts) + "\n"


def _group(data: str, rows: list[Row]) -> str:
    against = {base: found for base in BASES if (found := _differences(rows, base))}
    head = ["method", "seeds", "accuracy", *(f"against {base}" for base in against), "cost", "time", "flips", "papers"]
    methods = dict.fromkeys(row["method"] for row in rows)
    lines = [head, ["---"] * len(head), *(_line(method, rows, against, data) for method in methods)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    conclusion = _conclusion({**against, EQUAL: _at_equal_cost(rows, against)})
    return "\n\n".join([f"### {data}", _setting(rows[0]), table, conclusion])


def _differences(rows: list[Row], base: str) -> dict[str, Difference]:
    """Of each method to another one, over the seeds that both have."""
    found, theirs = {}, _by_seed(rows, base)
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != base):
        own = _by_seed(rows, method)
        seeds = [seed for seed in own if seed in theirs]
        if seeds:
            found[method] = Difference.of(*([_accuracy(runs[seed]) for seed in seeds] for runs in (own, theirs)))
    return found


def _at_equal_cost(rows: list[Row], against: dict[str, dict[str, Difference]]) -> dict[str, Difference]:
    """Of each method to the shortest training of the plain net that costs as much, give or take what `NEARLY` allows."""
    found = {}
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] not in BASES):
        cost = _relative(rows, method, "training_macs")
        bases = (base for base in against if cost <= NEARLY * _relative(rows, base, "training_macs"))
        base = next(bases, None)
        if base is not None and method in against[base]:
            found[method] = against[base][method]
    return found


def _relative(rows: list[Row], method: str, key: str) -> float:
    """The mean over seeds of what a method took, in that of the plain net; not a number without common seeds."""
    own, plain = _by_seed(rows, method), _by_seed(rows, PLAIN)
    ratios = [row[key] / plain[seed][key] for seed, row in own.items() if seed in plain]
    return statistics.fmean(ratios) if ratios else nan


def _by_seed(rows: list[Row], method: str) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if row["method"] == method}


def _accuracy(row: Row) -> float:
    return 100 * float(row["accuracy"]["fused"])


def _line(method: str, rows: list[Row], against: dict[str, dict[str, Difference]], data: str) -> list[str]:
    """One of the table."""
    own = _by_seed(rows, method)
    accuracy = [_accuracy(row) for row in own.values()]
    deviation = f" ± {statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else ""

    def total(count: Callable[[Row], int]) -> int:
        return sum(map(count, own.values()))

    return [
        method,
        str(len(own)),
        f"{statistics.fmean(accuracy):.2f}{deviation}",
        *(str(differences.get(method, "")) for differences in against.values()),
        *(
            "" if isnan(ratio := _relative(rows, method, key)) else f"{ratio:.2f}"
            for key in ("training_macs", "cpu_seconds")
        ),
        f"{total(lambda row: row['flips']['onnxruntime'])} of {total(lambda row: row['test_images'])}",
        PAPERS.get(data, {}).get(method, ""),
    ]


def _setting(row: Row) -> str:
    training = row["config"]["training"]
    options = ", ".join(f"{name}: {value}" for name, value in row["config"]["model"].get("options", {}).items())
    net = f"`{row['config']['model']['name']}`{f' ({options})' if options else ''}"
    return (
        f"Net {net}, {row['images']} training images of {row['data']}, {training['epochs']} epochs, "
        f"{row['hardware']}, torch {row['torch']}. With full `dyrep` blocks from the first epoch on a training would cost "
        f"{_cost_of_full_blocks(row):.2f}; DyRep grows them one by one."
    )


def _cost_of_full_blocks(row: Row) -> float:
    """Relative to the plain net."""
    model, x = ModelReference(**row["config"]["model"]).build(), torch.zeros(1, 3, 32, 32)
    return count_macs(repfx.expand(model, "dyrep", preserve=False), x) / count_macs(model, x)


def _conclusion(against: dict[str, dict[str, Difference]]) -> str:
    parts = []
    for base, differences in against.items():
        shown = {method: difference.mean for method, difference in differences.items() if difference.shown}
        better, worse = ("; ".join(m for m, mean in shown.items() if mean * sign > 0) or "none" for sign in (1, -1))
        parts.append(f"- Better than *{base}* beyond chance: {better}. Worse: {worse}.")
    return "\n".join([*parts, "", "Of all others nothing can be said from these runs."])

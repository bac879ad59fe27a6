"""The page `docs/evidence.md`, written from the rows of `benchmarks/accuracy.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from math import isnan, nan

import torch

import repfx
from benchmarks._evidence_questions import answers
from benchmarks._paired import Difference, Row, accuracy_of, by_seed
from repfx.measuring.cost import count_macs
from repfx.training.models import ModelReference

# the shortest training first; a scale has one of the last two
PLAIN, AS_LONG, FIVE_TIMES, LONGER = BASES = ("plain", "plain, 2.5 times", "plain, 5 times", "plain, longer")
EQUAL = "plain at equal cost"
NEARLY = 1.15  # up to this many times the multiply-adds of the plain net count as equal cost
# differences to the papers' own baselines, in percentage points, each on the paper's net and with its recipe
PAPERS: dict[str, dict[str, str]] = {
    "cifar10": {
        "ACB": "+0.30 (VGG-16, in RepNAS)",
        "DBB": "+0.67 (VGG-16), +0.62 (in RepNAS)",
        "DyRep": "+0.54 (VGG-16)",
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
SCALES = {  # in the order of the page
    "long": """\
The net is the VGG of seven convs with 8 to 64 channels that the older scale has, too. It trains on all 50,000 training images for 90
epochs. [The plan](evidence-plan.md) was written before the first result. It fixes the methods with all their options, the seeds, the order
of the runs, when to stop, and which comparison answers which question. What is missing in the table isn't done.""",
    "cpu": """\
The net is a VGG of seven convs with 8 to 64 channels. It trains on 10,000 of the 50,000 training images for 10 epochs. This is what two CPU
cores can do for all methods and several seeds. The scale, the recipe and the methods' settings were fixed before the first result was
seen. Three things were added later:

- What random search and DES find is trained once more from the beginning, as in their papers. The first run of random search had shown
  that the four epochs left after a search are too few.
- *RepNAS, retrained*, which its paper doesn't do, was added after two seeds of CIFAR-10.
- *Plain, 2.5 times* was also added after two seeds of CIFAR-10.

The results show which methods learn more in a short training of a small net. They can't show what the methods give in a training of
hundreds of epochs, where plain nets are close to what they can reach, or on nets of real width. A schedule that has forty adjustments in
its paper has seven here, a cycle of RepAn has five epochs, and a search learns its gates in five epochs. So a method that misses its
paper's gain here doesn't refute the paper, and a method that exceeds it doesn't confirm the paper. Where gains differ from the papers',
consider this:

- RepNAS continues training with the weights that its search leaves, as in its paper. Here, these are weights of a net whose paths were
  drawn at random for six of ten epochs, and its gradients weren't clipped, as they are in the authors' code. The recipe is the cause, not
  the architecture: the row below shows the same search, retrained. [Its page](papers/repnas.md) says more. *Random search* was where
  RepNAS is before it was retrained, too.
- DyRep grows blocks one by one: over the ten epochs, it runs less than two thirds of the multiply-adds of full blocks.
- The teacher isn't a ResNet-101 but a net of the same kind, twice as wide, and its training is as short.
- A net that is far from what it can reach gains more from longer training than from anything else. So a method that costs a multiple of
  the plain net's training can hardly beat the plain net at equal cost. OREPA, RepVGG and RepAn cost hardly more multiply-adds than the
  plain net.""",
}

INTRODUCTION = """\
# Evidence

<!-- written by `python -m benchmarks.accuracy --page docs/evidence.md`; change that instead -->

This page shows what the methods give when all of them train the same net on the same data, from the same seeds, with the same recipe.
[The plan of the next scale](evidence-plan.md) says how a longer training is going to answer what this one can't.

- *Accuracy* is that of the fused model on all test images, in percent: mean ± standard deviation over the seeds.
- *Against …* is the mean of the differences seed by seed, with an interval that contains the true mean in 95 of 100 repetitions, by
  Student's t. Where the interval contains 0, nothing is shown. With some fifteen methods, about one interval of a column would leave 0
  out by chance alone.
- *Cost* is the multiply-adds of the whole training, including those of a search and of a teacher, relative to plain's.
- *Time* is processor time, relative to plain's on the same kind of machine.
- *Plain, 2.5 times* takes as many multiply-adds as most methods, *plain, longer* as many as the most expensive method.
- *Plain at equal cost* is the first of *plain*, *plain, 2.5 times* and *plain, longer* for which the method costs at most 1.15 times as
  much.
- *Flips* are test images for which the file in onnxruntime gives another class than the model before it was fused.
- *Papers* are the differences that the papers report to their own baselines.
"""


def page(rows: Sequence[Row]) -> str:
    """Write the whole page."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row["scale"], {}).setdefault(row["data"], []).append(row)
    parts = [INTRODUCTION.rstrip()]
    for scale, by_data in sorted(groups.items(), key=lambda group: _position(group[0])):
        parts += [f"## {scale}", *([SCALES[scale]] if scale in SCALES else [])]
        for data, group in sorted(by_data.items()):
            parts += [_group(data, group), *([answers(group)] if scale == "long" else [])]
    return "\n\n".join(parts) + "\n"


def _position(scale: str) -> tuple[int, str]:
    return list(SCALES).index(scale) if scale in SCALES else len(SCALES), scale


def _group(data: str, rows: list[Row]) -> str:
    against = {base: found for base in BASES if (found := _differences(rows, base))}
    head = ["method", "seeds", "accuracy", *(f"against {base}" for base in against), "cost", "time", "flips", "papers"]
    methods = dict.fromkeys(row["method"] for row in rows)
    lines = [head, ["---"] * len(head), *(_line(method, rows, against, data) for method in methods)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    conclusion = _conclusion({**against, EQUAL: _at_equal_cost(rows, against)})
    return "\n\n".join([f"### {data}", _setting(rows), table, conclusion])


def _differences(rows: list[Row], base: str) -> dict[str, Difference]:
    """Return the difference of each method to `base`, over the seeds that both have."""
    found = {
        method: Difference.between(by_seed(rows, method), by_seed(rows, base))
        for method in dict.fromkeys(row["method"] for row in rows if row["method"] != base)
    }
    return {method: difference for method, difference in found.items() if difference is not None}


def _at_equal_cost(rows: list[Row], against: dict[str, dict[str, Difference]]) -> dict[str, Difference]:
    """Return the difference of each method to the shortest plain training that it costs at most `NEARLY` times as much as."""
    found = {}
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] not in BASES):
        cost = _relative(rows, method, "training_macs")
        bases = (base for base in against if cost <= NEARLY * _relative(rows, base, "training_macs"))
        base = next(bases, None)
        if base is not None and method in against[base]:
            found[method] = against[base][method]
    return found


def _relative(rows: list[Row], method: str, key: str) -> float:
    """Return what a method took relative to the plain net, as a mean over common seeds; NaN if there are none.

    Seconds are compared on one kind of machine alone.
    """
    own, plain = by_seed(rows, method), by_seed(rows, PLAIN)
    pairs = [(row, plain[seed]) for seed, row in own.items() if seed in plain]
    ratios = [
        row[key] / other[key] for row, other in pairs if key == "training_macs" or row["hardware"] == other["hardware"]
    ]
    return statistics.fmean(ratios) if ratios else nan


def _line(method: str, rows: list[Row], against: dict[str, dict[str, Difference]], data: str) -> list[str]:
    """Return the cells of one line of the table."""
    own = by_seed(rows, method)
    accuracy = [accuracy_of(row) for row in own.values()]
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


def _setting(rows: list[Row]) -> str:
    row = next(iter(by_seed(rows, PLAIN).values()), rows[0])
    machines = " or ".join(dict.fromkeys(each["hardware"] for each in rows))
    training = row["config"]["training"]
    options = ", ".join(f"{name}: {value}" for name, value in row["config"]["model"].get("options", {}).items())
    net = f"`{row['config']['model']['name']}`{f' ({options})' if options else ''}"
    return (
        f"Net {net}, {row['images']} training images of {row['data']}, {training['epochs']} epochs, "
        f"{machines}, torch {row['torch']}. With full `dyrep` blocks from the first epoch on, a training would cost "
        f"{_cost_of_full_blocks(row):.2f} times plain's multiply-adds; DyRep grows its blocks one by one."
    )


def _cost_of_full_blocks(row: Row) -> float:
    """Return the multiply-adds with full `dyrep` blocks, relative to the plain net."""
    model, x = ModelReference(**row["config"]["model"]).build(), torch.zeros(1, 3, 32, 32)
    return count_macs(repfx.expand(model, "dyrep", preserve=False), x) / count_macs(model, x)


def _conclusion(against: dict[str, dict[str, Difference]]) -> str:
    parts = []
    for base, differences in against.items():
        shown = {method: difference.mean for method, difference in differences.items() if difference.shown}
        better, worse = ("; ".join(m for m, mean in shown.items() if mean * sign > 0) or "none" for sign in (1, -1))
        parts.append(f"- Better than *{base}* beyond chance: {better}. Worse: {worse}.")
    return "\n".join([*parts, "", "For all other methods, these runs show nothing."])

"""Measure the accuracy that each method gives with the same training, and its cost.

    python -m benchmarks.accuracy --data cifar10.npz --scale cpu --out benchmarks/results/accuracy-cifar10-cpu.jsonl
    python -m benchmarks.accuracy --page docs/evidence.md

Every method trains the same net from the same seeds on the same data with the same recipe, and is fused, exported and tested in
onnxruntime. Each run is one line of the file, written when it is done. If the command is run again, it does the runs that are missing.
Several processes can share a file if each has its own seeds. *plain, 2.5 times* trains the plain net for as many multiply-adds as most
methods take, *plain, longer* for as many as the most expensive method took, so it comes last. The page is written from the committed
files alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from torch import nn

from benchmarks._evidence_page import AS_LONG, LONGER, PLAIN, page
from benchmarks._record import machine
from repfx.change.schedule import SCHEDULES
from repfx.data.augmentation import Augmentation
from repfx.data.dataset import DataSource
from repfx.measuring.cost import count_macs
from repfx.records.plain_values import to_plain
from repfx.search.base import Search
from repfx.training.experiment import Experiment, Metrics, run
from repfx.training.models import ModelReference
from repfx.training.recipe import Distillation, Recipe
from repfx.training.run_folder import ARCHITECTURE, RunFolder

RESULTS = Path(__file__).parent / "results"
TEACHER = "teacher"


@dataclass(frozen=True)
class Scale:
    """One net and its training, which are the same for all methods.

    Args:
        net, teacher: the net that is trained, and the one that it can learn from.
        training: the recipe, without a seed.
        gate_rate: learning rate of the gates in searches. It is the papers' 1e-4 times the papers' number of steps, 300 epochs of 391,
            divided by the number of steps here. With 1e-4 a short search would decide by the noise alone.
        images: number of training images; None for all.
    """

    net: ModelReference
    teacher: ModelReference
    training: Recipe
    gate_rate: float
    images: int | None = None


def small_vgg(num_classes: int = 10, width: int = 16) -> nn.Sequential:
    """Seven 3×3 convs with BatchNorm and ReLU in four stages, and a linear layer."""
    layers: list[nn.Module] = []
    before = 3
    for channels, convs in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        for _ in range(convs):
            conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes))


_SGD = Recipe(
    epochs=10,
    batch_size=128,
    optimizer="SGD",
    optimizer_options={"momentum": 0.9},
    learning_rate=0.1,
    weight_decay=5e-4,
    warm_up=1.0,
    augmentation=Augmentation(crop_padding=4, flip=0.5),
    channels_last=True,
)
_PAPERS = replace(_SGD, epochs=100, weight_decay=1e-4, workers=4, test_every=5)
_SMALL = "benchmarks.accuracy:small_vgg"
_LARGE = ModelReference("repfx.recipes.nets:resnet101")
SCALES: dict[str, Scale] = {
    "cpu": Scale(
        ModelReference(_SMALL, options={"width": 8}),
        ModelReference(_SMALL, options={"width": 16}),
        _SGD,
        gate_rate=0.03,
        images=10000,
    ),
    "vgg16": Scale(ModelReference("repfx.recipes.nets:vgg16"), _LARGE, _PAPERS, gate_rate=6e-4),
    "resnet18": Scale(ModelReference("repfx.recipes.nets:resnet18"), _LARGE, _PAPERS, gate_rate=6e-4),
    "smoke": Scale(
        ModelReference(_SMALL, options={"width": 4}),
        ModelReference(_SMALL, options={"width": 4}),
        replace(_SGD, epochs=4, batch_size=64),
        gate_rate=0.03,
        images=256,
    ),
}


@dataclass(frozen=True)
class Method:
    """A method: what is done besides training the net.

    Args:
        spec: branches that the net is expanded with; an empty list for none.
        schedule: name and options of a schedule, which then takes `spec`.
        distilled: whether the net learns from the teacher.
        retrained: whether the result of a search is trained again from the beginning by the same recipe; then both trainings count as cost.
        length: of the training, as a multiple of the recipe's epochs; None for as many multiply-adds as the most expensive method takes.
    """

    spec: Any = None
    schedule: Mapping[str, Any] | None = None
    distilled: bool = False
    retrained: bool = False
    length: float | None = 1.0


def _schedule(name: str, **options: Any) -> Method:
    return Method(schedule={"name": name, **options})


METHODS: dict[str, Method] = {
    PLAIN: Method([]),
    "ACB": Method("acb"),
    "DBB": Method("dbb"),
    "RepVGG": Method("repvgg"),
    "OREPA": Method("orepa", {"name": "fixed", "squeeze_from": 0}),
    "DyRep, Rep": _schedule("dyrep", drop=False),
    "DyRep, Rep + Dep": _schedule("dyrep"),
    "DyRep by snip": _schedule("dyrep", metric="snip"),
    "RepNAS": _schedule("repnas"),
    "RepNAS, retrained": Method(schedule={"name": "repnas"}, retrained=True),
    # in RepNAS's space and at its budget: 3.5 of a site's seven paths, one of which is its own conv
    "random search": Method(
        schedule={"name": "random_search", "spec": "odbb", "weights": "shared", "budget": 2.5 / 6}, retrained=True
    ),
    "DES": Method(schedule={"name": "des"}, retrained=True),
    "RepAn": _schedule("repan"),
    "RepAn, distilled": Method(schedule={"name": "repan"}, distilled=True),
    "distilled": Method([], distilled=True),
    AS_LONG: Method([], length=2.5),
    LONGER: Method([], length=None),
}


@dataclass
class Record:
    """The runs of a file, which grows run by run."""

    file: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def at(cls, file: Path) -> Record:
        """Read the runs that the file holds so far."""
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return cls(file, [json.loads(line) for line in lines])

    def has(self, scale: str, method: str, seed: int) -> bool:
        """Whether this run is done."""
        return any((row["scale"], row["method"], row["seed"]) == (scale, method, seed) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append a run to the file."""
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def dearest(self, scale: str, seed: int) -> float:
        """Cost of the most expensive method, as a multiple of the plain net's multiply-adds."""
        costs = {
            row["method"]: row["training_macs"] for row in self.rows if (row["scale"], row["seed"]) == (scale, seed)
        }
        return float(max(costs.values()) / costs[PLAIN])


def one_run(
    scale: str, name: str, seed: int, data: Path, teacher: Path | None, out: Path, *, length: float = 1.0
) -> dict[str, Any]:
    """Train, fuse, export and test; return the row for the file."""
    setting, method = SCALES[scale], METHODS.get(name, Method([]))
    net = setting.teacher if name == TEACHER else setting.net
    training = replace(setting.training, seed=seed, epochs=max(1, round(length * setting.training.epochs)))
    if method.distilled:
        assert teacher is not None
        training = replace(training, distillation=Distillation(setting.teacher, str(teacher), 0.9, 10.0))
    schedule = method.schedule
    if schedule is not None and issubclass(SCHEDULES[schedule["name"]], Search):
        schedule = {"learning_rate": setting.gate_rate, **schedule}
    experiment = Experiment(net, DataSource(str(data)), method.spec, schedule, training, out=out, overwrite=True)
    began, began_cpu = time.perf_counter(), time.process_time()
    stages = [_trained(experiment)]
    if method.retrained:
        found = str(out / ARCHITECTURE)
        stages.append(_trained(replace(experiment, spec=found, schedule=None, out=out / "retrained")))
    metrics, images = stages[-1].metrics, _count(data)
    taught = _macs_of(setting.teacher) * training.epochs if method.distilled else 0
    return {
        "scale": scale,
        "method": name,
        "seed": seed,
        "data": data.stem,
        "images": images,
        "accuracy": metrics.accuracy,
        "flips": metrics.flips,
        "test_images": metrics.test_images,
        # a step costs three forward passes, and one of the teacher
        "training_macs": images * (3 * sum(stage.macs for stage in stages) + taught),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - began_cpu,
        "epochs": [accuracy for stage in stages for accuracy in stage.accuracies],
        "config": _config(experiment),
        **machine("cuda" if torch.cuda.is_available() else "cpu"),  # the device of a recipe that names none
    }


@dataclass(frozen=True)
class _Stage:
    """One training: its metrics, the multiply-adds of a forward pass summed over epochs, and each epoch's accuracy."""

    metrics: Metrics
    macs: int
    accuracies: list[float | None]


def _trained(experiment: Experiment) -> _Stage:
    metrics, history = run(experiment), RunFolder(experiment.out).history
    assert metrics is not None
    assert history is not None
    macs = sum(epoch.macs for epoch in history.epochs[1:])
    return _Stage(metrics, macs, [epoch.accuracy for epoch in history.epochs])


def _config(experiment: Experiment) -> dict[str, Any]:
    """All settings that a run depends on, with files by their names alone."""
    config: dict[str, Any] = to_plain({**experiment.values, "weights": None})
    config["data"]["name"] = Path(config["data"]["name"]).name
    taught = experiment.training.distillation
    if taught is not None:
        config["training"]["distillation"]["weights"] = Path(taught.weights).name
    return config


def _macs_of(teacher: ModelReference) -> int:
    return count_macs(teacher.build(), torch.zeros(1, 3, 32, 32))


def _count(data: Path) -> int:
    with numpy.load(data) as arrays:
        return len(arrays["y_train"])


def _part(data: Path, images: int | None, folder: Path) -> Path:
    """The data with `images` training images, in which each class keeps its share."""
    if images is None:
        return data
    with numpy.load(data) as arrays:
        found = dict(arrays)
    chosen = numpy.random.default_rng(0).permutation(len(found["y_train"]))[:images]
    found |= {name: found[name][chosen] for name in ("x_train", "y_train")}
    numpy.savez(folder / data.name, **found)
    return folder / data.name


def measure(data: Path, scale: str, methods: list[str], seeds: list[int], record: Record) -> None:
    """Do all runs that the record lacks."""
    with TemporaryDirectory() as folder:
        part = _part(data, SCALES[scale].images, Path(folder))
        teacher: Path | None = None
        for seed in seeds:
            for name in [method for method in METHODS if method in methods]:
                if record.has(scale, name, seed):
                    continue
                if METHODS[name].distilled and teacher is None:
                    one_run(scale, TEACHER, 0, part, None, Path(folder) / "teacher")
                    teacher = Path(folder) / "teacher" / "checkpoint.safetensors"
                length = METHODS[name].length or record.dearest(scale, seed)
                row = one_run(scale, name, seed, part, teacher, Path(folder) / "run", length=length)
                record.add(row)
                print(f"{name}, seed {seed}: {row['accuracy']['fused']:.2%} in {row['seconds']:.0f} s", flush=True)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an .npz file with x_train, y_train, x_test, y_test")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path, help="write the page from the committed results")
    parser.add_argument("--smoke", action="store_true", help="a few methods for four epochs on 256 random images")
    arguments = parser.parse_args()
    if arguments.smoke:
        with TemporaryDirectory() as folder:
            record = Record.at(Path(folder) / "smoke.jsonl")
            measure(_noise(Path(folder)), "smoke", [PLAIN, "OREPA", "RepAn, distilled", LONGER], [0], record)
            print(page(record.rows))
    elif arguments.page is not None:
        files = sorted(RESULTS.glob("accuracy-*.jsonl"))
        arguments.page.write_text(page([row for file in files for row in Record.at(file).rows]), encoding="utf-8")
    else:
        if arguments.data is None or arguments.out is None:
            parser.error("give --data and --out, or --page")
        measure(arguments.data, arguments.scale, arguments.methods, arguments.seeds, Record.at(arguments.out))


def _noise(folder: Path) -> Path:
    """Write a data set of random images."""
    numbers = numpy.random.default_rng(0)
    arrays: dict[str, Callable[[int], Any]] = {
        "x": lambda count: numbers.integers(256, size=(count, 32, 32, 3), dtype=numpy.uint8),
        "y": lambda count: numpy.arange(count) % 10,
    }
    parts = {
        f"{name}_{part}": make(count) for part, count in (("train", 256), ("test", 64)) for name, make in arrays.items()
    }
    numpy.savez(folder / "noise.npz", **parts)
    return folder / "noise.npz"


if __name__ == "__main__":
    main()

"""Measure what tracked norms keep of a Diverse Branch Block's gain, on a small net trained for a short time.

    python -m benchmarks.tracked --data cifar10.npz --seeds 5 --out benchmarks/results/tracked-cifar10-cpu.jsonl

The net has five convs. Each run trains it on 12,800 images of CIFAR-10 or CIFAR-100 for ten epochs, from the same first weights, on the
same images in the same order, and tests the fused net on all test images. Branches begin as in their papers. `orepa` and `dbb-tracked` are
squeezed from the first step. Two more runs take about as much processor time as `dbb-tracked`: the plain net with 13 epochs, and `dbb` with
3. Each run is one line of the file, written when it is done. If the command is run again, it does the runs that are missing. A run that
was killed resumes after its last epoch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import repfx
from benchmarks._paired import Difference
from benchmarks._record import machine
from benchmarks.accuracy import noise
from repfx.records.version import VERSION

TRACKED = "dbb-tracked"  # the branches of `dbb`, with tracked norms
METHODS = {  # the preset, and how many times the setting's epochs
    "plain": ("plain", 1.0),
    "dbb": ("dbb", 1.0),
    TRACKED: (TRACKED, 1.0),
    "orepa": ("orepa", 1.0),
    "plain, 13 epochs": ("plain", 1.3),
    "dbb, 3 epochs": ("dbb", 0.3),
}
SQUEEZED = (TRACKED, "orepa")
REFERENCES = ("plain", "plain, 13 epochs", "dbb")
HEAD = ("method", "accuracy, %", *(f"against {name}" for name in REFERENCES), "processor time, plain = 1")
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Setting:
    """The training of every run. `images` is the number of training images."""

    images: int = 12_800
    epochs: int = 10
    batch: int = 128
    rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4


def net(preset: str, width: int = 16, classes: int = 10) -> nn.Module:
    """Return five 3×3 convs with BatchNorm and ReLU, two of them with stride 2, and a linear layer, with the branches of a preset.

    The preset ``plain`` has none.
    """
    layers: list[nn.Module] = []
    channels = 3
    for out, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 1)):
        layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    plain = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    if preset == "plain":
        return plain
    spec = repfx.Spec(["1x1", "1x1-kxk", "1x1-avg"], norm="tracked") if preset == TRACKED else preset
    model: nn.Module = repfx.expand(plain, spec, preserve=False)
    if preset in SQUEEZED:
        repfx.squeeze(model)
    return model


def prepared(images: Any) -> Tensor:
    """Return images ``(count, height, width, 3)`` of bytes as normalised numbers ``(count, 3, height, width)``."""
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / deviation


def varied(x: Tensor, chance: torch.Generator) -> Tensor:
    """Return images flipped at random, each by itself, and all shifted by the same few pixels."""
    flips = torch.rand(len(x), generator=chance).view(-1, 1, 1, 1) < 0.5
    down, across = torch.randint(0, 9, (2,), generator=chance).tolist()
    height, width = x.shape[2:]
    padded = F.pad(torch.where(flips, x.flip(3), x), [4] * 4)
    return padded[:, :, down : down + height, across : across + width]


class Run:
    """One training.

    Args:
        data: images and labels.
        method: a name of `METHODS`.
        seed: seed of the weights, of the choice of images and of their order.
        setting: the training.
    """

    def __init__(self, data: Mapping[str, Any], method: str, seed: int, setting: Setting) -> None:
        chosen = torch.randperm(len(data["x_train"]), generator=torch.Generator().manual_seed(1000 + seed))
        numbers = chosen[: setting.images].numpy()
        self.x, self.y = (
            prepared(data["x_train"][numbers]),
            torch.from_numpy(data["y_train"][numbers].astype(numpy.int64)),
        )
        preset, times = METHODS[method]
        self.setting = setting = replace(setting, epochs=max(1, round(times * setting.epochs)))
        self.classes = int(data["y_train"].max()) + 1
        self.data, self.name = data, {"method": method, "seed": seed}
        torch.manual_seed(seed)
        self.model = net(preset, classes=self.classes).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), setting.rate, setting.momentum, weight_decay=setting.weight_decay
        )
        self.steps, self.chance = setting.images // setting.batch, torch.Generator().manual_seed(seed)
        self.rate = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, setting.epochs * self.steps)
        self.epoch, self.seconds, self.loss = 0, 0.0, 0.0

    def row(self, file: Path) -> dict[str, Any]:
        """Train for all epochs that are left, keep the state in a file after each, and return the row of the run."""
        self._resume(file)
        while self.epoch < self.setting.epochs:
            began = time.process_time()
            self._train()
            self.epoch, self.seconds = self.epoch + 1, self.seconds + time.process_time() - began
            torch.save(self._state, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
        accuracy = tested(repfx.fuse(self.model.eval()), self.data)
        measured = {"classes": self.classes, "accuracy": accuracy, "loss": self.loss, "cpu_seconds": self.seconds}
        return {**self.name, **measured, **asdict(self.setting), "repfx": VERSION, **machine("cpu")}

    def _train(self) -> None:
        self.model.train()
        order = torch.randperm(self.setting.images, generator=self.chance)
        for some in order[: self.steps * self.setting.batch].split(self.setting.batch):
            batch = varied(self.x[some], self.chance).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(self.model(batch), self.y[some])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.rate.step()
        self.loss = float(loss.detach())

    @property
    def _state(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "rate": self.rate}
        numbers = {"epoch": self.epoch, "seconds": self.seconds, "loss": self.loss, "chance": self.chance.get_state()}
        return {**self.name, **numbers, **{name: part.state_dict() for name, part in parts.items()}}

    def _resume(self, file: Path) -> None:
        state = torch.load(file) if file.is_file() else {}
        if any(state.get(name) != value for name, value in self.name.items()):
            return
        for name, part in (("model", self.model), ("optimizer", self.optimizer), ("rate", self.rate)):
            part.load_state_dict(state[name])
        self.chance.set_state(state["chance"])
        self.epoch, self.seconds, self.loss = state["epoch"], state["seconds"], state["loss"]


@torch.no_grad()
def tested(model: nn.Module, data: Mapping[str, Any]) -> float:
    """Return the accuracy on all test images, in percent."""
    x, y = prepared(data["x_test"]), torch.from_numpy(data["y_test"].astype(numpy.int64))
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500)))
    return 100 * right / len(y)


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Return the rows that a file holds so far."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def measure(data: Mapping[str, Any], out: Path, seeds: range, setting: Setting) -> None:
    """Do all runs that the file lacks: all methods with the first seed, then all with the next."""
    done = {(row["method"], row["seed"]) for row in rows_of(out)}
    for seed in seeds:
        for method in METHODS:
            if (method, seed) not in done:
                row = Run(data, method, seed, setting).row(out.with_suffix(".pt"))
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def compared(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return for each method its mean accuracy, its differences from the nets of `REFERENCES`, and its time relative to the plain net.

    All are over the seeds that every method has. The differences have intervals of 95 %.
    """
    found = {method: {row["seed"]: row for row in rows if row["method"] == method} for method in METHODS}
    seeds = sorted(set.intersection(*(set(own) for own in found.values())))
    accuracies = {method: [found[method][seed]["accuracy"] for seed in seeds] for method in METHODS}
    seconds = {method: sum(found[method][seed]["cpu_seconds"] for seed in seeds) for method in METHODS}

    def cells(method: str) -> Iterator[str]:
        yield method
        yield f"{statistics.fmean(accuracies[method]):.2f}"
        for other in REFERENCES:
            yield "" if other == method else str(Difference.of(accuracies[method], accuracies[other]))
        yield f"{seconds[method] / seconds['plain']:.2f}"

    return [tuple(cells(method)) for method in METHODS] if seeds else []


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an .npz file with x_train, y_train, x_test, y_test")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file of the runs, one a line")
    parser.add_argument("--smoke", action="store_true", help="one epoch on 32 random images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        if arguments.smoke:
            setting, seeds = Setting(images=32, epochs=1, batch=16), range(1)
            arguments.data, arguments.out = noise(Path(folder) / "noise.npz", 32), Path(folder) / "smoke.jsonl"
        elif arguments.data is None or arguments.out is None:
            parser.error("give --data and --out, or --smoke")
        else:
            setting, seeds = Setting(), range(arguments.seeds)
        with numpy.load(arguments.data) as arrays:
            measure(dict(arrays), arguments.out, seeds, setting)
        table = Table(*HEAD, box=SIMPLE_HEAD)
        for cells in compared(rows_of(arguments.out)):
            table.add_row(*cells)
        Console().print(table)


if __name__ == "__main__":
    main()

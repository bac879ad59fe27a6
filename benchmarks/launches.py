"""Count the operations of a training step, because a GPU that computes small batches waits for each of them to be started.

    python -m benchmarks.launches --out benchmarks/results/launches.json

The model is torchvision's ResNet-18. An operation is what ATen is asked for in the forward and the backward pass, except views and memory.
For a GPU it is counted on the meta device, where repfx puts the same operations together. On a CPU each squeezed part assembles its own
kernel. Other rows count an optimizer's step, in which one operation may be several kernels, and the observation of gradients. *Seconds*
are those of steps on a CPU, all in turns in one process, as repfx does them and with kernels assembled together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import repfx
from benchmarks._comparison import Ratio
from benchmarks._record import Row, machine, write
from benchmarks.compiled import gated
from benchmarks.training import expanded, textbook
from repfx.blocks import together
from repfx.change.saliency import METRICS
from repfx.measuring.cost import measure_times

MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "textbook DBB": textbook,
    "dbb": expanded("dbb"),
    "dbb, gated": gated,
    "dbb, frozen, squeezed": expanded("dbb", frozen=True, squeezed=True),
    "dyrep, frozen, squeezed": expanded("dyrep", frozen=True, squeezed=True),
    "orepa, squeezed": expanded("orepa", squeezed=True),
    "repvgg, frozen, squeezed": expanded("repvgg", frozen=True, squeezed=True),
    "acb, frozen, squeezed": expanded("acb", frozen=True, squeezed=True),
}
TIMED = ("dbb, frozen, squeezed", "orepa, squeezed")
OPTIMIZERS: dict[str, dict[str, bool]] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
_MEMORY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view")


class Operations(TorchDispatchMode):
    """Counts operations except views and memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        self.count += not function.is_view and function.overloadpacket.__name__ not in _MEMORY
        return function(*args, **(options or {}))


def operations(work: Callable[[], object]) -> int:
    """Return how many operations a piece of work has, after it was done once."""
    work()
    counted = Operations()
    with counted:
        work()
    return counted.count


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let squeezed parts assemble their kernels together on a CPU, too."""
    before, together.ALONE = together.ALONE, frozenset()
    try:
        yield
    finally:
        together.ALONE = before


class Step:
    """A forward and a backward pass of a model; each call is one."""

    def __init__(self, model: str, device: str, batch: int) -> None:
        torch.manual_seed(0)
        self.model = MODELS[model](torchvision.models.resnet18(num_classes=10)).to(device).train()
        self.x = torch.randn(batch, 3, 32, 32, device=device)
        self.y = torch.zeros(batch, dtype=torch.long, device=device)

    def __call__(self) -> None:
        self.model.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()

    def on(self, device: str) -> Step:
        """Move the step to another device, for good."""
        self.model.to(device)
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self

    def together(self) -> None:
        """Run with the kernels of squeezed parts assembled together."""
        with as_on_a_gpu():
            self()


def count(model: str) -> Row:
    """Return the operations of a step of one model."""
    step = Step(model, "cpu", 2)
    return {"what": model, "CPU": operations(step), "GPU": operations(step.on("meta"))}


def count_rest() -> list[Row]:
    """Return the operations of optimizers' steps and of the observation of gradients, for a plain and an expanded model, on a CPU."""
    rows: list[Row] = []
    for model in ("plain", "dbb"):
        step = Step(model, "cpu", 2)
        step()
        for name, options in OPTIMIZERS.items():
            optimizer = torch.optim.SGD(step.model.parameters(), 0.01, momentum=0.9, **options)
            rows.append({"what": f"SGD, {name}: {model}", "CPU": operations(optimizer.step)})
    for metric in METRICS:
        step = Step("plain", "cpu", 2)
        optimizer = torch.optim.SGD(step.model.parameters(), 0.01, momentum=0.9)
        driver = repfx.Driver(step.model, optimizer, repfx.schedules.DyRep(metric=metric), calibrate=[step.x])
        step()
        rows.append({"what": f"observing {metric}: plain", "CPU": operations(driver.after_backward)})
    return rows


def measure(turns: int, batch: int) -> list[Row]:
    """Compare the seconds of squeezed steps on a CPU with those of the plain model."""
    plain = Step("plain", "cpu", batch)
    steps: dict[str, Callable[[], object]] = {"plain": plain}
    for name in TIMED:
        step = Step(name, "cpu", batch)
        steps |= {name: step, f"{name}, together": step.together}
    times = measure_times(steps, rounds=turns, warm_up=1)
    rows: list[Row] = []
    for name, seconds in times.items():
        ratio = Ratio.of(seconds, times["plain"]).rounded(3, "relative to plain")
        rows.append({"what": f"step: {name}", "seconds": round(median(seconds), 4), **ratio})
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="three models, and no times")
    arguments = parser.parse_args()
    models = ["plain", "dbb", "repvgg, frozen, squeezed"] if arguments.smoke else list(MODELS)
    rows = [count(model) for model in models]
    if not arguments.smoke:
        rows += [*count_rest(), *measure(arguments.turns, arguments.batch)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=160).print(table)
    if arguments.out is not None and not arguments.smoke:
        write(arguments.out, {**machine("cpu"), "input": f"{arguments.batch} × 3 × 32 × 32"}, rows)


if __name__ == "__main__":
    main()

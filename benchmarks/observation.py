"""Measure the cost of observing gradients for DyRep.

    python -m benchmarks.observation --out benchmarks/results/observation-cpu.json

Each turn times a training step of a ResNet-18, plain or expanded, and the driver's work between the backward pass and the optimizer's
step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import repfx
from benchmarks._comparison import Ratio
from benchmarks._record import Row, machine, write
from repfx.change.saliency import METRICS

FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "dyrep": lambda model: repfx.expand(model, "dyrep"),
}


def seconds(work: Callable[[], object], device: str) -> float:
    """Seconds of one call, until the device is done."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(form: str, metric: str, turns: int, batch: int, device: str) -> Row:
    """The ratio of a step with observation to the same step without."""
    torch.manual_seed(0)
    model = FORMS[form](torchvision.models.resnet18(num_classes=10)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    schedule = repfx.schedules.DyRep(metric=metric)
    driver = repfx.Driver(model, optimizer, schedule, calibrate=[x])

    def forward_and_backward() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()

    def turn() -> tuple[float, float]:
        before = seconds(forward_and_backward, device)
        observing = seconds(driver.after_backward, device)
        return before + seconds(optimizer.step, device), observing

    turn()
    times = [turn() for _ in range(turns)]
    ratio = Ratio.of([step + observing for step, observing in times], [step for step, _ in times])
    numbers = {"step": sorted(step for step, _ in times)[turns // 2], **vars(ratio)}
    return {"model": "resnet18", "form": form, "metric": metric, **numbers}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one turn of two images each")
    arguments = parser.parse_args()
    turns, batch = (1, 2) if arguments.smoke else (arguments.turns, arguments.batch)
    cases = [("plain", metric) for metric in METRICS] + [("dyrep", "synflow")]
    rows = [measure(form, metric, turns, batch, arguments.device) for form, metric in cases]
    table = Table("model", "form", "saliency", "step, ms", "with observation / without", box=SIMPLE_HEAD)
    for row in rows:
        ratio = f"{row['median']:.4f} ({row['low']:.4f}–{row['high']:.4f})"
        table.add_row(str(row["model"]), str(row["form"]), str(row["metric"]), f"{float(row['step']) * 1e3:.1f}", ratio)
    Console().print(table)
    if arguments.out is not None and not arguments.smoke:
        write(arguments.out, {**machine(arguments.device), "input": f"{batch} × 3 × 32 × 32"}, rows)


if __name__ == "__main__":
    main()

"""Measure the cost of a step of a gated supernet, by the share of paths that its budget lets run.

    python -m benchmarks.gates --out benchmarks/results/gates-cpu.json

The net is a ResNet-18 for small images with the search space of RepNAS, whose paths are drawn anew for each step. The plain net runs in
the same turns. The cost of the branches is the time of a step beyond the plain net's. Memory is what autograd keeps for the backward
pass; on a GPU it is the peak of all allocations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import repfx
from benchmarks._memory import bytes_of, peak_on_gpu
from benchmarks._record import Row, machine, write
from repfx.measuring.cost import measure_times
from repfx.recipes.nets import resnet18

BUDGETS: dict[str, float] = {"1/3": 1 / 3, "1/2": 1 / 2, "2/3": 2 / 3, "all": 1.0}


class Step:
    """A training loop; each call is one step. In a search, each step draws its paths by the budget."""

    def __init__(self, budget: float | None, batch: int, device: str) -> None:
        torch.manual_seed(0)
        self.model = resnet18().to(device)
        self.x, self.y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        search = None if budget is None else repfx.schedules.RepNAS(budget=budget, warm_up=0, epochs=9)
        schedule = search or repfx.schedules.DyRep(interval=99, metric="snip")
        self.driver = repfx.Driver(self.model, self.optimizer, schedule, calibrate=[self.x])
        self.searches = search is not None

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        if self.searches:
            self.driver.after_backward()
        self.optimizer.step()

    def memory(self) -> int:
        """Bytes that a forward pass keeps besides the parameters, or the peak on a GPU."""
        if self.x.is_cuda:
            return bytes_of(self.model) + peak_on_gpu(self)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = F.cross_entropy(self.model(self.x), self.y)
        total = sum(size for pointer, size in kept.items() if pointer not in own)
        loss.backward()
        self.driver.after_backward()
        return total


def share(values: list[float], plain: list[float], full: list[float]) -> float:
    """The median share of the cost of all branches."""
    return median((a - p) / (f - p) for a, p, f in zip(values, plain, full))


def measure(batch: int, turns: int, device: str) -> list[Row]:
    """One row for each budget."""
    steps: dict[str, Step] = {"plain": Step(None, batch, device)}
    steps |= {name: Step(budget, batch, device) for name, budget in BUDGETS.items()}
    calls: dict[str, Callable[[], object]] = dict(steps)
    times = measure_times(calls, rounds=turns, warm_up=1)
    memories = {name: [float(step.memory()) for _ in range(turns)] for name, step in steps.items()}
    rows: list[Row] = []
    for name in steps:
        ratios = [a / b for a, b in zip(times[name], times["plain"])]
        row: dict[str, str | float] = {
            "budget": name,
            "step": median(times[name]),
            "step_to_plain": median(ratios),
            "memory": median(memories[name]),
            "memory_to_plain": median(memories[name]) / median(memories["plain"]),
        }
        if name != "plain":
            row["branch_time"] = share(times[name], times["plain"], times["all"])
            row["branch_memory"] = share(memories[name], memories["plain"], memories["all"])
        rows.append(row)
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one turn of two images")
    arguments = parser.parse_args()
    turns, batch = (1, 2) if arguments.smoke else (arguments.turns, arguments.batch)
    rows = measure(batch, turns, arguments.device)
    table = Table("budget", "step / plain", "memory / plain", "branches' time", "and memory", box=SIMPLE_HEAD)
    for row in rows:
        shares = [f"{float(row[name]):.0%}" if name in row else "" for name in ("branch_time", "branch_memory")]
        ratios = [f"{float(row[name]):.2f}" for name in ("step_to_plain", "memory_to_plain")]
        table.add_row(str(row["budget"]), *ratios, *shares)
    Console().print(table)
    if arguments.out is not None and not arguments.smoke:
        write(arguments.out, {**machine(arguments.device), "input": f"{batch} × 3 × 32 × 32"}, rows)


if __name__ == "__main__":
    main()

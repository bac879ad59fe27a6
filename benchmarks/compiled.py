"""Measure whether torch.compile works for blocks in training, and how much time it saves.

    python -m benchmarks.compiled --out benchmarks/results/compiled-cpu.json

The net is a small ResNet-18 for images of 32 × 32 with one block for each width, channels last, trained by SGD with momentum. Each
candidate is compared with itself, in turns: eager, and with forward and backward pass compiled by inductor. The optimizer is the same.
A graph break is an error. *Graphs* counts the graphs compiled in all turns: one, unless something is compiled again. *Compile* is the
time that the first step takes beyond a later one, from empty caches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from benchmarks._comparison import Ratio
from benchmarks._record import Row, machine, write
from benchmarks.training import expanded
from repfx.blocks.paths import blocks_at
from repfx.measuring.cost import measure_times
from repfx.passes.gate import gate

WIDTHS: tuple[int, ...] = (64, 128)
TOLERANCE = 1e-3  # GPUs round products to ten bits


def net(widths: Sequence[int]) -> nn.Sequential:
    """One conv, and a block of ResNet-18 for each width."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    layers += [BasicBlock(widths[0], widths[0])]
    for before, width in pairwise(widths):
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        layers += [BasicBlock(before, width, 2, shortcut)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def gated(model: nn.Module) -> nn.Module:
    """Expand a model with the branches of `dbb` and gates that let the same two branches of each block run at every step."""
    model = expanded("dbb")(model)
    for site, block in blocks_at(model, "*").items():
        gate(model, site)
        assert block.gates is not None
        block.gates.choose(list(block.branches)[:2])
    return model


CANDIDATES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "dbb": expanded("dbb"),
    "dbb, gated": gated,
    "orepa, squeezed": expanded("orepa", squeezed=True),
    "dbb, frozen, squeezed": expanded("dbb", frozen=True, squeezed=True),
}


class Step:
    """A training loop; each call is one step and returns its loss."""

    def __init__(self, candidate: str, widths: Sequence[int], batch: int, device: str, backend: str | None) -> None:
        torch.manual_seed(0)
        model: Any = CANDIDATES[candidate](net(widths))
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.run = self.model if backend is None else torch.compile(self.model, backend=backend, fullgraph=True)
        self.x = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(10, (batch,), device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.run(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def compile_seconds(step: Step, eager: Step) -> float:
    """Return the seconds of the first step. The second step's loss, which shows the first one's gradients, must equal the eager one's."""
    started = perf_counter()
    float(step())
    seconds = perf_counter() - started
    eager()
    assert torch.allclose(step(), eager(), rtol=TOLERANCE), "compiled, it learns something else"
    return seconds


def as_row(candidate: str, first: float, graphs: int, eager: Sequence[float], compiled: Sequence[float]) -> Row:
    """One line of the result, from the seconds of each turn."""
    return {
        "candidate": candidate,
        "graphs": graphs,
        "compile": round(first - median(compiled), 1),
        "eager": round(median(eager), 4),
        "compiled": round(median(compiled), 4),
        **Ratio.of(compiled, eager).rounded(),
    }


def measure(candidate: str, widths: Sequence[int], batch: int, turns: int, device: str, backend: str) -> Row:
    """Compare a candidate, compiled, with itself, eager."""
    torch.compiler.reset()
    counters.clear()
    eager, compiled = (Step(candidate, widths, batch, device, how) for how in (None, backend))
    with fresh_cache():
        first = compile_seconds(compiled, eager)
        times = measure_times({"eager": eager, "compiled": compiled}, rounds=turns, warm_up=1)
    return as_row(candidate, first, counters["stats"]["unique_graphs"], times["eager"], times["compiled"])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--smoke", action="store_true", help="one turn of two images, narrow, traced but left to eager kernels"
    )
    arguments = parser.parse_args()
    widths, turns, batch, backend = WIDTHS, arguments.turns, arguments.batch, "inductor"
    if arguments.smoke:
        widths, turns, batch, backend = (8,), 1, 2, "aot_eager"
    rows = [measure(candidate, widths, batch, turns, arguments.device, backend) for candidate in arguments.candidates]
    table = Table("candidate", "graphs", "compile", "eager", "compiled", "ratio", "95 %", box=SIMPLE_HEAD)
    for row in rows:
        seconds = (f"{float(row[key]):.3g} s" for key in ("compile", "eager", "compiled"))
        interval = f"{float(row['low']):.3f}–{float(row['high']):.3f}"
        table.add_row(str(row["candidate"]), str(row["graphs"]), *seconds, f"{float(row['ratio']):.3f}", interval)
    Console(width=100).print(table)
    if arguments.out is not None and not arguments.smoke:
        write(arguments.out, {**machine(arguments.device), "input": f"{batch} × 3 × 32 × 32"}, rows)


if __name__ == "__main__":
    main()

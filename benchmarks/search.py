"""Measure whether a search finds the branches that help where chance doesn't.

    python -m benchmarks.search --out benchmarks/results/search.json

The task is built so that the answer is known. A teacher is a small net with one or two branches beside each conv; their kinds differ
from site to site, and their weights are random. The student has the same convs, frozen, and branches of all kinds, of which it may keep as
many as the teacher has. Only the teacher's kinds can learn the whole difference to the teacher: the middle taps of the teacher's 1×k and
k×1 are zero, so that neither of them, nor a 1×1, can replace another.

All searches train for the same number of steps of one net; those that score candidates score the same number. The branches that were
found are then trained for as long again.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import repfx
from benchmarks._record import Row, machine, write
from repfx.passes.calibrate import calibrate
from repfx.passes.freeze import freeze
from repfx.search.base import Search

KINDS = ("1x1", "1xk", "kx1", "1x1-avg", "dilated-2x2", "identity")
TRUTH: dict[str, tuple[str, ...]] = {
    "rows": ("1xk",),
    "columns": ("kx1",),
    "corners": ("dilated-2x2",),
    "both": ("1xk", "dilated-2x2"),
    "none": (),
}
BUDGET = sum(map(len, TRUTH.values()))
CHANNELS = 8


class Towers(nn.Module):
    """Convs with BatchNorms side by side, so that a branch helps its site whatever the other sites do."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.rows_norm = self._tower()
        self.columns, self.columns_norm = self._tower()
        self.corners, self.corners_norm = self._tower()
        self.both, self.both_norm = self._tower()
        self.none, self.none_norm = self._tower()

    @staticmethod
    def _tower() -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, channels, height, width)`` to the outputs of all towers, stacked along the channels."""
        towers = [
            self.rows_norm(self.rows(x)),
            self.columns_norm(self.columns(x)),
            self.corners_norm(self.corners(x)),
            self.both_norm(self.both(x)),
            self.none_norm(self.none(x)),
        ]
        return torch.cat(towers, 1)


@dataclass(frozen=True)
class Task:
    """A student, images, and the outputs that it has to learn. The last quarter is for scoring, the one before it for the result."""

    student: nn.Module
    images: Tensor
    targets: Tensor

    @classmethod
    def make(cls, seed: int, count: int) -> Task:
        """Make a task, with another teacher for each seed."""
        torch.manual_seed(seed)
        plain = Towers()
        images = torch.randn(count, CHANNELS, 10, 8)
        spec = {site: list(kinds) for site, kinds in TRUTH.items() if kinds}
        teacher = repfx.expand(plain, spec, preserve=False)
        for name, parameter in teacher.named_parameters():
            if name.endswith(("1xk.conv.weight", "kx1.conv.weight")):
                parameter.detach()[..., 1, :].squeeze_().zero_() if "kx1" in name else parameter.detach()[
                    ..., 1
                ].zero_()
        calibrate(teacher, [images])
        student = repfx.expand(plain, list(KINDS))
        for site in TRUTH:
            if site in spec:
                known = teacher.get_submodule(f"{site}.origin")
                student.get_submodule(f"{site}.origin").load_state_dict(known.state_dict())
            freeze(student, site)
        with torch.no_grad():
            return cls(student, images, teacher.eval()(images))

    def part(self, first: float, last: float) -> tuple[Tensor, Tensor]:
        """Some of the images, with their targets."""
        chosen = slice(int(first * len(self.images)), int(last * len(self.images)))
        return self.images[chosen], self.targets[chosen]

    def error(self, net: nn.Module, first: float, last: float) -> float:
        """Mean squared error, relative to the variance of the targets."""
        images, targets = self.part(first, last)
        with torch.no_grad():
            return float(F.mse_loss(net(images), targets) / targets.var())


def searches(epochs: int, seed: int) -> dict[str, Search]:
    """Searches to compare, each of `epochs` epochs."""
    common: dict[str, Any] = {"budget": BUDGET, "warm_up": epochs // 8, "epochs": epochs, "spec": None, "seed": seed}
    learned = {"learning_rate": 0.05, "betas": (0.9, 0.999)}
    scored = {"population": 24, "generation": max(1, epochs // 10), "nets": 1}
    return {
        "repnas": repfx.schedules.RepNAS(**common, **learned, origin=False),
        "des": repfx.schedules.DES(**common, **learned, **scored),
        "random_search": repfx.schedules.RandomSearch(**common, **scored),
    }


def run(name: str, search: Search, seed: int, count: int) -> Row:
    """Run one search, and train the branches that it has found."""
    task = Task.make(seed, count)
    model = task.student
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    train, targets = task.part(0.0, 0.5)
    driver = repfx.Driver(
        model, optimizer, search, calibrate=train.split(64), score=lambda net: -task.error(net, 0.75, 1.0)
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(2 * search.epochs):
        model.train()
        for batch in torch.randperm(len(train), generator=order).split(64):
            optimizer.zero_grad()
            for share in driver.shares():
                (share * F.mse_loss(model(train[batch]), targets[batch])).backward()
            driver.after_backward()
            optimizer.step()
        driver.after_epoch()
    assert driver.search is not None
    sites = driver.search.architecture.sites
    found = {(site, branch.kind) for site, code in sites.items() for branch in code.chosen}
    true = {(site, kind) for site, kinds in TRUTH.items() for kind in kinds}
    return {
        "search": name,
        "seed": seed,
        "found": len(found & true),
        "kept": len(found),
        "budget": BUDGET,
        "error": task.error(repfx.fuse(model).eval(), 0.5, 0.75),
        "codes": " ".join(code.code[1:] for code in sites.values()),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one seed, four epochs of few images")
    arguments = parser.parse_args()
    seeds, epochs, count = (1, 4, 64) if arguments.smoke else (arguments.seeds, arguments.epochs, 1024)
    rows = [run(name, search, seed, count) for seed in range(seeds) for name, search in searches(epochs, seed).items()]
    table = Table("search", "branches found, of those that help", "error", box=SIMPLE_HEAD)
    for name in searches(epochs, 0):
        own = [row for row in rows if row["search"] == name]
        found = ", ".join(f"{row['found']}" for row in own)
        errors = ", ".join(f"{float(row['error']):.3f}" for row in own)
        mean = fmean(float(row["error"]) for row in own)
        table.add_row(name, f"{found} of {BUDGET}", f"{errors}; mean {mean:.4f}")
    Console().print(table)
    if arguments.out is not None and not arguments.smoke:
        setting: dict[str, str | float] = {"epochs": epochs, "images": count, "kinds": ", ".join(KINDS)}
        write(arguments.out, {**machine("cpu"), **setting}, rows)


if __name__ == "__main__":
    main()

"""Runs with the files that the training loop leaves, for tests that read these files: short real runs, and a long invented one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repfx.blocks.spec import BranchSpec
from repfx.passes.drop import Drop
from repfx.passes.expand import Expand
from repfx.records.journal import Action
from repfx.training.experiment import Experiment, run
from repfx.training.models import ModelReference
from repfx.training.recipe import Recipe
from repfx.training.runs.history import Epoch, History

TINY = f"{Path(__file__).with_name('tiny.py')}:net"


def record(out: Path, schedule: str, epochs: int, **options: Any) -> None:
    """Train a tiny net on the digits with a schedule."""
    run(
        Experiment(
            model=ModelReference(TINY),
            schedule={"name": schedule, "spec": "repvgg", **options},
            training=Recipe(epochs=epochs),
            image_size=8,
            out=out,
        )
    )


def long_history(sites: int = 100, epochs: int = 600) -> History:
    """An invented history of DyRep on a large net: every 15 epochs two sites grow and some branches leave."""
    kinds = tuple(map(BranchSpec, ("1x1", "1x1-kxk", "1x1-avg", "1xk", "kx1", "identity")))
    order = [f"layer{index % 4 + 1}.{index // 4}.conv2" for index in range(sites)]
    born: dict[str, dict[str, int]] = {}
    found = []
    for epoch in range(epochs + 1):
        blocks: Mapping[str, Mapping[str, float | None]] = {
            site: {"origin": 1.0, **{name: _grown(name, epoch - since) for name, since in branches.items()}}
            for site, branches in born.items()
        }
        actions: list[Action] = []
        if epoch and epoch % 15 == 0 and epoch < epochs:
            for site, branches in list(born.items()):
                weak = [name for name, since in branches.items() if epoch - since >= 30 and _grown(name, 99) < 0.04]
                actions += [Drop(site, name) for name in weak]
                born[site] = {name: since for name, since in branches.items() if name not in weak}
            for site in order[epoch // 15 * 5 % sites :][:5]:
                if site not in born:
                    actions.append(Expand(site, kinds, gamma=0.01))
                    born[site] = {kind.kind: epoch for kind in kinds}
        loss = None if not epoch else 2.3 * math.exp(-epoch / 150) + 0.05
        accuracy = 1 - 0.9 * math.exp(-epoch / 120)
        macs = 1_800_000_000 + 30_000_000 * sum(map(len, born.values()))
        seconds = None if not epoch else macs / 4e7
        rate = None if not epoch else 0.05 * (1 + math.cos(math.pi * epoch / epochs))
        ema = accuracy * 0.99 if epoch else None
        found.append(Epoch(epoch, loss, accuracy, ema, rate, seconds, macs // 150, macs, tuple(actions), blocks))
    return History(tuple(found))


def _grown(name: str, age: int) -> float:
    end = 0.9 if name.startswith("1x1") else 0.02 if name == "identity" else 0.25
    return end + (0.01 - end) * math.exp(-max(age, 0) / 40)

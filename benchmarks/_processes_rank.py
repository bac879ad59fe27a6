"""One process of `benchmarks.processes`: `repfx train` with a clock around what it waits for.

    torchrun --nproc-per-node 2 -m benchmarks._processes_rank FOLDER train …

Each process writes its seconds into a file in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from repfx.cli import main
from repfx.search import searcher
from repfx.training import experiment
from repfx.training.loop import _Training

PARTS = ("data", "steps", "tests", "scoring", "rest")


class Clock:
    """Seconds of each part of a training."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its seconds added to a part."""

        @wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[part] += time.perf_counter() - began

        return run

    def waited(self, batches: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
        """Return the iteration of a training's batches with the seconds of each wait added to ``data``."""

        @wraps(batches)
        def run(training: Any) -> Iterator[Any]:
            found = iter(batches(training))
            take = self.timed("data", lambda: next(found, None))
            while (batch := take()) is not None:
                yield batch

        return run

    def part_of(self, whole: float) -> dict[str, float]:
        """Return the share of each part of the whole time."""
        known = {part: self.seconds[part] / whole for part in PARTS if part != "rest"}
        return {**known, "rest": 1 - sum(known.values())}


def run(folder: Path, arguments: list[str]) -> None:
    """Run a command, and write the shares of the training's time."""
    clock = Clock()
    whole: defaultdict[str, float] = defaultdict(float)
    training: Any = _Training
    training._rest_of_epoch = clock.waited(training._rest_of_epoch)
    training._step = clock.timed("steps", training._step)
    training._accuracy = clock.timed("tests", training._accuracy)
    changed: Any = searcher
    changed.scores = clock.timed("scoring", changed.scores)
    go = training.go

    def timed_go(*given: Any) -> Any:
        began = time.perf_counter()
        try:
            return go(*given)
        finally:
            whole["seconds"] += time.perf_counter() - began

    training.go = timed_go
    afterwards: Any = experiment
    afterwards._finish = lambda *given: None  # fusing, exporting and testing are the first process's alone
    try:
        main(arguments)
    except SystemExit as ended:
        if ended.code:
            raise
    rank = int(os.environ.get("RANK", 0))
    row = {"rank": rank, "seconds": whole["seconds"], **clock.part_of(whole["seconds"])}
    (folder / f"rank{rank}.json").write_text(json.dumps(row))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])

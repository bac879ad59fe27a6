"""Things that the processes of `benchmarks/accuracy.py` share: the rows that are done, the time that runs took, and locks."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._evidence_page import PLAIN


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
        """Append a run to the file. It is one write, so that several processes can append to one file."""
        self.rows.append(row)
        with self.file.open("ab", buffering=0) as file:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())

    def dearest(self, scale: str, seed: int) -> float:
        """Cost of the most expensive method, as a multiple of the plain net's multiply-adds."""
        costs = {
            row["method"]: row["training_macs"] for row in self.rows if (row["scale"], row["seed"]) == (scale, seed)
        }
        return float(max(costs.values()) / costs[PLAIN])


class Spent:
    """Seconds of the processor and of the clock that a run has taken, in all processes that worked on it.

    They are kept in a file. What a killed process did after its last `write` isn't counted; nor does the resumed run keep it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._before = json.loads(file.read_text()) if file.is_file() else [0.0, 0.0]
        self._began = time.process_time(), time.perf_counter()

    @property
    def seconds(self) -> list[float]:
        """Seconds of the processor, and of the clock."""
        now = time.process_time(), time.perf_counter()
        return [before + end - begin for before, begin, end in zip(self._before, self._began, now)]

    def write(self) -> None:
        """Write the seconds so far."""
        staged = self.file.with_suffix(".new")
        staged.write_text(json.dumps(self.seconds))
        staged.replace(self.file)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock, which the system releases when the process ends; wait while another process holds it."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Hold a lock if it is free; yield whether it was."""
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True

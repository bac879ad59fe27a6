"""The arithmetic of ImageNet in several processes, against numbers worked out by hand, and the clock of a process."""

from __future__ import annotations

import time

import pytest

from benchmarks._processes_rank import PARTS, Clock
from docs.hooks.imagenet import counts, imagenet
from repfx.training.named_recipes import shipped_recipes


def test_steps_and_images_are_those_of_the_recipes() -> None:
    found = counts()
    assert found.keys() == {name for name in shipped_recipes() if "imagenet" in name}
    # 1,281,167 = 5004 · 256 + 143, and 143 images are enough for a batch of eight processes
    assert found["dyrep-resnet18-imagenet"] == {
        "epochs": 120,
        "steps": 120 * 5005,
        "train": 120 * 1_281_167,
        "test": 120 * 50_000,
        "score": 0,
    }
    # 128,116 are held out, and 1,153,051 = 4504 · 256 + 27; scores after epochs 15, 25, …, 95 and 100 of 128 candidates
    assert found["des-resnet18-imagenet"] == {
        "epochs": 100,
        "steps": 100 * 4505,
        "train": 100 * 1_153_051,
        "test": 100 * 50_000,
        "score": 10 * 128 * 128_116,
    }
    row = next(line for line in imagenet().splitlines() if "dyrep-resnet18-imagenet" in line)
    assert row == "| `dyrep-resnet18-imagenet` | 120 | 600\u202f600 | 153.7 M | 6.0 M | 0.0 M | 1.3 % |"


def test_a_clock_gives_each_part_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(seconds: float, result: int = 0) -> int:
        now[0] += seconds
        return result

    clock = Clock()
    batches = clock.waited(lambda of: (takes(2.0, batch) for batch in (1, 2, 3)))(None)
    for batch in batches:
        assert clock.timed("steps", takes)(5.0, batch) == batch
    clock.timed("tests", takes)(1.0)
    with pytest.raises(TypeError):
        clock.timed("scoring", takes)()
    takes(8.0)
    assert now[0] == 30
    shares = clock.part_of(30.0)
    assert tuple(shares) == PARTS
    assert shares == pytest.approx({"data": 0.2, "steps": 0.5, "tests": 1 / 30, "scoring": 0.0, "rest": 8 / 30})

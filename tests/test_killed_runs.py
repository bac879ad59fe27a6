"""A run that is killed at any moment goes on to the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs.killable import PER_EPOCH, STEPS

ROOT = Path(__file__).resolve().parents[1]


def start(schedule: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.programs.killable", schedule, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def go_until(process: subprocess.Popen[str], step: int) -> list[int]:
    """The steps that it went, to this one at least."""
    assert process.stdout is not None
    steps = []
    for line in process.stdout:
        steps.append(int(line))
        if steps[-1] >= step:
            break
    return steps


@pytest.mark.parametrize(
    "schedule", ["dyrep", *(pytest.param(name, marks=pytest.mark.slow) for name in ("repan", "repnas", "des"))]
)
def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path: Path, schedule: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert go_until(start(schedule, whole), STEPS)[-1] == STEPS
    chance = random.Random(schedule)
    # right before a rewrite, right after one, and somewhere
    for step in (PER_EPOCH - 1, 2 * PER_EPOCH, chance.randrange(2 * PER_EPOCH + 1, STEPS - 3)):
        process = start(schedule, killed)
        went = go_until(process, step)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert went[-1] == step
    last = start(schedule, killed)
    assert go_until(last, STEPS)[0] > PER_EPOCH
    assert last.wait(60) == 0
    assert (killed / "run.ckpt").read_bytes() == (whole / "run.ckpt").read_bytes()
    assert [path.name for path in killed.iterdir() if not path.name.startswith(".")] == ["run.ckpt"]

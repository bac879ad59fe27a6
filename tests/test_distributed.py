"""Two processes with different data and different random numbers take the same decisions and keep the same weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize(
    "schedule", ["dyrep", *(pytest.param(name, marks=pytest.mark.slow) for name in ("repan", "repnas", "des"))]
)
def test_both_ranks_end_with_the_same_model(schedule: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "tests.programs.on_two_ranks", schedule]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "expand" in done.stdout

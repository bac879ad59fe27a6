"""Two processes with different data and different random numbers make the same decisions and keep the same weights."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from repfx.training.run_folder import HISTORY, RunFolder
from repfx.training.runs.history import History
from tests.two_ranks import run_on_two_ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow_one_in(2)
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["dyrep", "repan", "repnas", "des"])
def test_both_ranks_end_with_the_same_model(schedule: str) -> None:
    assert "expand" in run_on_two_ranks("on_two_ranks", schedule)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_a_training_on_two_ranks_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "repfx"]
    options = ["--model", f"{ROOT / 'tests' / 'tiny.py'}:net", "--image-size=8", "--epochs=16"]
    options += ["--schedule=dyrep", "--schedule-option=interval=4", "--learning-rate=0.02", "--average=0.9"]
    interrupted, whole = tmp_path / "interrupted", tmp_path / "whole"
    with subprocess.Popen(
        [*launcher, "train", *options, "--out", str(interrupted)], cwd=ROOT, stderr=subprocess.PIPE
    ) as run:
        wait_for_epochs(interrupted, 6)
        run.send_signal(signal.SIGINT)
        assert run.stderr is not None
        told = run.stderr.read().decode()
    assert "go on with: repfx train --resume" in told, told[-3000:]
    resumed = ["train", "--resume", "--trust", "--out", str(interrupted)]
    for command in (resumed, ["train", *options, "--out", str(whole)]):
        done = subprocess.run([*launcher, *command], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("in onnxruntime") == 1  # only the first process prints
    weights = [RunFolder(folder).load(trust=True).state_dict() for folder in (interrupted, whole)]
    assert weights[0].keys() == weights[1].keys()
    worst = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    assert worst < 1e-5  # observations from before the interruption are summed in another order


def wait_for_epochs(folder: Path, count: int) -> None:
    for _ in range(1200):
        if (folder / HISTORY).is_file() and len(
            History.from_json((folder / HISTORY).read_text(), folder).epochs
        ) > count:
            return
        time.sleep(0.1)
    raise AssertionError(f"no {count} epochs in {folder}")

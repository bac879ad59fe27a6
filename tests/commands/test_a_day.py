"""A day with `repfx train`: killed twice, resumed, extended, compared with the plain model, reported and used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from repfx.training.run_folder import BEST, CHECKPOINT, HISTORY, METRICS, MODEL, STATE
from repfx.training.runs.history import History

TINY = f"{Path(__file__).parents[1] / 'tiny.py'}:net"
TRAIN = ("train", "--epochs", "3", "--batch-size", "64", "--learning-rate", "0.01", "--keep", "both")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six hundred digits as image files, one of them broken."""
    root, digits = tmp_path_factory.mktemp("data"), load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:600], digits.target)):
        folder = root / str(label)
        folder.mkdir(exist_ok=True)
        Image.fromarray((image * 15).astype(numpy.uint8)).save(folder / f"{number:04}.png")
    broken = min((root / "3").iterdir())
    broken.write_bytes(broken.read_bytes()[:60])
    return root


def killed(how: signal.Signals, after: str, *arguments: object) -> None:
    """Run a command in a process of its own, with one thread, and kill it once it has printed a line that begins so."""
    command = [sys.executable, "-c", "from repfx.cli import main; main()", *map(str, arguments)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_thread)
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if line.startswith(after):
            process.send_signal(how)
            break
    else:
        pytest.fail("".join(told))
    process.communicate()
    assert process.returncode != 0


@pytest.mark.slow
def test_a_day(pictures: Path, tmp_path: Path, repfx_command: Any) -> None:
    def repfx(*arguments: object) -> Any:
        done = repfx_command(*arguments)
        assert done.code == 0, done.err
        return done

    out, whole = tmp_path / "runs" / "day", tmp_path / "runs" / "whole"
    new = (*TRAIN, "--model", TINY, "--data", pictures, "--image-size", "8", "--spec", "1x1,1xk")
    killed(signal.SIGKILL, "epoch 1:", *new, "--out", out)
    killed(signal.SIGTERM, "epoch 2:", "train", "--resume", "--trust", "--out", out)
    assert (out / STATE).is_file()
    assert not (out / METRICS).exists()
    repfx("train", "--resume", "--trust", "--out", out)
    repfx(*new, "--out", whole)
    assert (out / CHECKPOINT).read_bytes() == (whole / CHECKPOINT).read_bytes()

    extended = repfx("train", "--resume", "--trust", "--out", out, "--epochs", 5, "--baseline", "plain")
    assert "This is one run of each." in extended.out
    assert "1 image file couldn't be read and had to be left out" in extended.out
    assert "1 training image can't be read and is left out: " in extended.err
    metrics = json.loads((out / METRICS).read_text())
    assert (metrics["epoch"], len(metrics["losses"]), len(metrics["unreadable"])) == (5, 5, 1)
    assert metrics["losses"][:3] == json.loads((whole / METRICS).read_text())["losses"]
    assert metrics["accuracy"]["fused"] > 0.6
    assert metrics["flips"] == {"fused": 0, "onnxruntime": 0}
    assert metrics["accuracy"]["plain"] == json.loads((out / "baseline" / METRICS).read_text())["accuracy"]["fused"]
    assert [epoch.epoch for epoch in History.from_json((out / HISTORY).read_text()).epochs] == list(range(6))

    repfx("report", out, "--trust")
    page = (out / "report.html").read_text()
    assert all(part in page for part in ("By the branches", "1 image file couldn", 'id="classes"', "top 5"))
    sevens = sorted((pictures / "7").iterdir())[:20]
    said = json.loads(repfx("predict", out / MODEL, *sevens, "--json").out)
    assert sum(each["classes"][0]["class"] == "7" for each in said) > 10
    found = json.loads(repfx("evaluate", out / BEST, "--trust", "--data", pictures, "--json").out)
    assert found["accuracy"] >= metrics["accuracy"]["fused"]

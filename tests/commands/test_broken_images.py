"""Image files that can't be read, as a user of the command line meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_image_files import folder, truncate


def test_strict_data_is_read_before_anything_else(tmp_path: Path, repfx_command: Any) -> None:
    root = folder(tmp_path / "data", 10)
    truncate(root / "light" / "1.png")
    outcome = repfx_command(
        "train", "--data", root, "--image-size", 8, "--strict-data", "--out", tmp_path / "runs" / "a"
    )
    assert outcome.code == 2
    assert outcome.err.startswith("repfx: 1 image can't be read: ")
    assert "light/1.png' (image file is truncated" in outcome.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_records_what_it_left_out(tmp_path: Path, repfx_command: Any) -> None:
    root, out = folder(tmp_path / "data", 10), tmp_path / "out"
    for name in ("dark/0.png", "light/4.png"):
        truncate(root / name)
    tiny = f"{Path(__file__).parents[1] / 'tiny.py'}:net"
    outcome = repfx_command("train", "-m", tiny, "--data", root, "--image-size", 8, "--epochs", 1, "--out", out)
    assert outcome.code == 0, outcome.err
    told = outcome.err.splitlines()
    assert told[0].startswith("1 test image can't be read and is left out: ")
    assert told[-1].startswith("1 training image can't be read and is left out: ")
    metrics = json.loads((out / "metrics.json").read_text())
    assert sorted(Path(path).name for path in metrics["unreadable"]) == ["0.png", "4.png"]
    assert metrics["test_images"] == 3
    outcome = repfx_command("evaluate", out, "--trust", "--data", root)
    assert "1 image can't be read and is left out: " in outcome.out
    images = [root / "light" / name for name in ("1.png", "4.png", "2.png")]
    outcome = repfx_command("predict", out / "model.onnx", *images, "--json")
    assert outcome.code == 2
    assert [Path(row["image"]).name for row in json.loads(outcome.out)] == ["1.png", "2.png"]
    assert "4.png' can't be read as an image: image file is truncated" in outcome.err

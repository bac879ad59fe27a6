"""`repfx profile` on models: the table, the JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

TINY = f"{Path(__file__).parents[1] / 'tiny.py'}:net"
SHAPE = ("--num-classes", 3, "--input-shape", "1x8x8", "--rounds", 2)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_profile(runtime: str, repfx_command: Any) -> None:
    outcome = repfx_command("profile", TINY, *SHAPE, "--runtime", runtime, "--rows", 1, "--threads", 1)
    assert outcome.code == 0, outcome.err
    assert f"A run in {runtime}: " in outcome.out
    assert "with 1 thread." in outcome.out
    outcome = repfx_command("profile", TINY, *SHAPE, "--runtime", runtime, "--json")
    found = json.loads(outcome.out)
    assert found["runtime"] == runtime
    merged = [row["merged"] for row in found["rows"] if row["layer"].startswith("Conv2d")]
    assert max(merged) >= 2


def test_what_can_not_be_is_refused(repfx_command: Any) -> None:
    outcome = repfx_command("profile", TINY, *SHAPE, "--runtime", "tvm")
    assert outcome.code == 2
    assert "tvm" in outcome.err

"""Two connected processes, started as torchrun does, but without a third process that loads torch only to watch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_on_two_ranks(program: str, *arguments: str, seconds: float = 240) -> str:
    """Run a module of `tests.programs` on two ranks and return what both print; check that both exit with 0."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    meeting["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", f"tests.programs.{program}", *arguments]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**meeting, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        said = [rank.communicate(timeout=seconds) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(error[-3000:] for _, error in said)
    return "".join(output for output, _ in said)

"""Result files of benchmarks: rows as JSON, with the machine and the versions that they were measured on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

Row = Mapping[str, str | float]


def machine(device: str) -> dict[str, str]:
    """The hardware that the model runs on, and the versions of the software."""
    hardware = (
        torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    )
    versions = {name: version(name) for name in ("torch", "torchvision", "onnxruntime")}
    return {"hardware": hardware, "python": platform.python_version(), **versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in _lines(info) if line.startswith("model name")]
    return names[0] if names else platform.processor() or os.uname().machine


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def write(file: Path, setting: Row, rows: Sequence[Row]) -> None:
    """Write readable JSON, one row a line, so that two results can be compared line by line."""
    head = json.dumps(dict(setting), indent=2, ensure_ascii=False)
    body = ",\n".join(f"    {json.dumps(dict(row), ensure_ascii=False)}" for row in rows)
    file.write_text(f'{head[:-2]},\n  "rows": [\n{body}\n  ]\n}}\n', encoding="utf-8")

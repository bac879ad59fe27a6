"""Measure every conv net of torchvision, and the smallest of every module of timm, and compare with fusing by timm and torch.

    python -m benchmarks.zoo                      models that the record lacks
    python -m benchmarks.zoo --again 'timm/*'     these once more
    python -m benchmarks.zoo --select             write the list of models anew, from the libraries that are installed

Nets of other libraries (`pip install -e ".[zoo]"`) have a record of their own, and are examined if their library is installed.
Each model has a process of its own, and the records grow with each; at the end `docs/zoo.md` is written from them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import _zoo_libraries
from benchmarks._record import machine, write
from benchmarks._zoo_model import STRUCTURE_ONLY
from benchmarks._zoo_page import page

RECORD = Path(__file__).parent / "results" / "zoo.json"
OTHERS_RECORD = RECORD.with_name("zoo_libraries.json")
PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
MODELS = Path(__file__).parent / "zoo_models.txt"
SMOKE = ("torchvision/mobilenet_v3_small", "timm/repvgg_a0")
TIMEOUT = 1800
RE_PARAMETERIZED = (
    "efficientvim_m1",
    "efficientvit_m0",
    "fastvit_t8",
    "ghostnetv3_050",
    "iformer_t",
    "lcnetv2_small",
    "levit_128s",
    "mobileone_s0",
    "nextvit_small",
    "repghostnet_050",
    "repvgg_a0",
    "repvit_m1",
    "shvit_s1",
    "tiny_vit_5m_224",
)

Row = dict[str, Any]


def select() -> list[str]:
    """Select all of torchvision's models that aren't quantized, the smallest model of each module of timm (and the next one, if the
    smallest is only for tests), and the smallest model of each family with blocks to re-parameterize.
    """
    import timm
    import torch
    import torchvision

    sizes: dict[str, list[tuple[float, str]]] = {}
    for name in timm.list_models():
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        sizes.setdefault(timm.model_entrypoint(name).__module__, []).append((size, name))
    chosen = {min(models)[1] for models in sizes.values()} | set(RE_PARAMETERIZED)
    chosen |= {min(model for model in models if not model[1].startswith("test_"))[1] for models in sizes.values()}
    own = [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]
    return [f"torchvision/{name}" for name in own] + [f"timm/{name}" for name in sorted(chosen)]


def run(names: Iterable[str], processes: int) -> Iterator[Row]:
    """Yield the rows of these models as they are done."""
    with ThreadPoolExecutor(processes) as pool:
        yield from pool.map(_examine, names)


def _examine(name: str) -> Row:
    command = [sys.executable, "-m", "benchmarks._zoo_model", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "problem": f"no result after {TIMEOUT} s"}
    if done.returncode:
        return {"name": name, "problem": f"the process ended with {done.returncode}: {done.stderr.strip()[-200:]}"}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def read(file: Path) -> dict[str, Row]:
    """The rows of a record by model; none if there is no record."""
    return {row["name"]: row for row in json.loads(file.read_text())["rows"]} if file.is_file() else {}


def save(file: Path, rows: dict[str, Row]) -> None:
    """Write a record, in the order of the names."""
    setting: dict[str, str | float] = {
        **machine("cpu"),
        "timm": version("timm"),
        "structure_only_above": STRUCTURE_ONLY,
        "listed": len(MODELS.read_text().split()),
    }
    write(file, setting, [rows[name] for name in sorted(rows)])


def save_others(file: Path, rows: dict[str, Row]) -> None:
    """Write the record of the other libraries. The versions of those that aren't installed stay as they were."""
    before = json.loads(file.read_text()) if file.is_file() else {}
    versions = {
        name: version(name) if _zoo_libraries.installed(name) else before[name]
        for name in _zoo_libraries.LIBRARIES
        if _zoo_libraries.installed(name) or name in before
    }
    setting: dict[str, str | float] = {**machine("cpu"), **versions, "listed": len(_zoo_libraries.names())}
    write(file, setting, [rows[name] for name in sorted(rows)])


def main() -> None:
    """Examine the models that are asked for and write the record."""
    parser = argparse.ArgumentParser(description="repfx on every conv net of torchvision and a sample of timm.")
    parser.add_argument("--again", default="", help="pattern of names to examine again though the record has them")
    parser.add_argument("--only", default="*", help="pattern of names")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--select", action="store_true", help="write the list of models and stop")
    parser.add_argument("--smoke", action="store_true", help="two models, without writing the record")
    options = parser.parse_args()
    if options.select:
        MODELS.write_text("\n".join(select()) + "\n")
        return
    with TemporaryDirectory() as folder:
        record, others = (Path(folder) / each.name if options.smoke else each for each in (RECORD, OTHERS_RECORD))
        rows, rows_of_others = read(record), read(others)
        more = {name for name in _zoo_libraries.names() if _zoo_libraries.installed(name) and not options.smoke}
        names = SMOKE if options.smoke else [*MODELS.read_text().split(), *sorted(more)]
        done_before = rows.keys() | rows_of_others.keys()
        todo = [
            name
            for name in names
            if fnmatch(name, options.only) and (name not in done_before or fnmatch(name, options.again))
        ]
        for done, row in enumerate(run(todo, options.processes), 1):
            if row["name"] in more:
                rows_of_others[row["name"]] = row
                save_others(others, rows_of_others)
            else:
                rows[row["name"]] = row
                save(record, rows)
            print(f"{done}/{len(todo)} {row['name']}: {row['problem'] or 'equal'}", flush=True)
        text = page(*(json.loads(each.read_text(encoding="utf-8")) for each in (record, others) if each.is_file()))
    if not options.smoke:
        PAGE.write_text(text, encoding="utf-8")
    elif any(row["problem"] for row in rows.values()):
        sys.exit("the models of the smoke run have problems")


if __name__ == "__main__":
    main()

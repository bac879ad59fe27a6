"""Measure what each of two processes of a search waits for: data, tests, and the scores of candidates.

    python -m benchmarks.processes --out benchmarks/results/processes-cpu.json

The data are made up: a folder of small image files, of which a tenth is for tests. Both processes run on the CPU, connected by gloo. Each
case is one training of `repfx train` with DES. In it, a quarter of the epochs, but at least one, warms the supernet up.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks._processes_rank import PARTS
from benchmarks._record import Row, machine, write

CLASSES, SIDE = 10, 32
_MODEL = ["--model", "benchmarks.accuracy:small_vgg", "--option", "width=8", "--image-size", str(SIDE)]
_MODEL += ["--device", "cpu", "--seed", "0"]


def make_images(folder: Path, files: int) -> None:
    """Write small JPEG files of ten colours, nine tenths into ``train/`` and one into ``test/``."""
    numbers = numpy.random.default_rng(0)
    for index in range(files):
        label = index // 10 % CLASSES
        part = folder / ("test" if index % 10 == 0 else "train") / f"class{label}"
        part.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 120, (SIDE, SIDE, 3), dtype=numpy.uint8)
        pixels[..., label % 3] += numpy.uint8(13 * label)
        Image.fromarray(pixels).save(part / f"{index}.jpg", quality=90)


def search_options(epochs: int, population: int) -> list[str]:
    """Return the options of a search whose last epoch is the training's."""
    options = {"epochs": epochs, "warm_up": max(1, epochs // 4), "generation": 1, "population": population, "nets": 1}
    given = [f"--schedule-option={name}={value}" for name, value in options.items()]
    return ["--schedule", "des", "--spec", "acb", *given, "--epochs", str(epochs)]


def measure(images: Path, options: Sequence[str], workers: int, batch: int) -> list[Row]:
    """Train once in two processes; return a row for each, with the shares of its time."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launch, "-m", "benchmarks._processes_rank", folder, "train", *_MODEL, *options]
        command += ["--data", str(images), "--workers", str(workers), "--batch-size", str(batch), "--json"]
        command += ["--out", f"{folder}/run"]
        alone = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        found = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
        if found.returncode:
            raise RuntimeError(f"the training failed:\n{found.stderr[-3000:]}")
        rows = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(2)]
    return [{"workers": workers, **row} for row in rows]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, nargs="+", default=[0])
    parser.add_argument("--note", default="", help="what else is to be known of the measurement")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="200 files, two candidates")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.files, arguments.population, arguments.batch = 200, 2, 64
    options = search_options(arguments.epochs, arguments.population)
    torch.set_num_threads(1)  # as in the processes, for the record
    with tempfile.TemporaryDirectory() as images:
        make_images(Path(images), arguments.files)
        rows = [row for each in arguments.workers for row in measure(Path(images), options, each, arguments.batch)]
    table = Table("workers", "process", "seconds", *PARTS, box=SIMPLE_HEAD)
    for row in rows:
        shares = [f"{float(row[part]):.1%}" for part in PARTS]
        table.add_row(str(row["workers"]), str(row["rank"]), f"{float(row['seconds']):.1f}", *shares)
    Console().print(table)
    if arguments.out is not None and not arguments.smoke:
        told = {"files": arguments.files, "epochs": arguments.epochs, "population": arguments.population}
        write(arguments.out, {**machine("cpu"), **told, "batch": arguments.batch, "note": arguments.note}, rows)


if __name__ == "__main__":
    main()

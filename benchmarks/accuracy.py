"""Measure the accuracy that each method gives with the same training, and its cost.

    python -m benchmarks.accuracy --data cifar10.npz --scale cpu --out benchmarks/results/accuracy-cifar10-cpu.jsonl
    python -m benchmarks.accuracy --data cifar10.npz --scale long --work DIR --out benchmarks/results/accuracy-cifar10-long.jsonl
    python -m benchmarks.accuracy --page docs/evidence.md

Every method trains the same net from the same seeds on the same data with the same recipe, and is fused, exported and tested in
onnxruntime. Each run is one line of the file, written when it is done. If the command is run again, it does the runs that are missing. With
`--work`, a run that was killed resumes after its last epoch, and several processes of one machine share the work if each runs this
command. *plain, longer* trains the plain net for as many multiply-adds as the most expensive method took, so it comes last. The page is
written from the committed files alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
from torch import nn

from benchmarks._accuracy_methods import SCALES
from benchmarks._accuracy_record import Record
from benchmarks._accuracy_runs import Work, measure
from benchmarks._evidence_page import LONGER, PLAIN, page
from repfx.errors import Interrupted

RESULTS = Path(__file__).parent / "results"


def small_vgg(num_classes: int = 10, width: int = 16) -> nn.Sequential:
    """Seven 3×3 convs with BatchNorm and ReLU in four stages, and a linear layer."""
    layers: list[nn.Module] = []
    before = 3
    for channels, convs in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        for _ in range(convs):
            conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an .npz file with x_train, y_train, x_test, y_test")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="methods of the scale; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, help="by default those of each method")
    parser.add_argument("--out", type=Path, help="file of the runs, one a line")
    parser.add_argument("--work", type=Path, help="folder in which runs keep what they need to be resumed")
    parser.add_argument("--page", type=Path, help="write the page from the committed results")
    parser.add_argument("--smoke", action="store_true", help="a few methods for four epochs on 256 random images")
    arguments = parser.parse_args()
    if arguments.smoke:
        _smoke()
    elif arguments.page is not None:
        files = sorted(RESULTS.glob("accuracy-*.jsonl"))
        arguments.page.write_text(page([row for file in files for row in Record.at(file).rows]), encoding="utf-8")
    else:
        if arguments.data is None or arguments.out is None:
            parser.error("give --data and --out, or --page")
        known = SCALES[arguments.scale].listed
        names = arguments.methods or known
        if unknown := [name for name in names if name not in known]:
            parser.error(f"the scale {arguments.scale} has no method {unknown[0]!r}; it has {', '.join(known)}")
        _measure(arguments, names)


def _measure(arguments: argparse.Namespace, names: list[str]) -> None:
    with ExitStack() as stack:
        folder = arguments.work or Path(stack.enter_context(TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        work = Work(arguments.scale, arguments.data.resolve(), Record.at(arguments.out), folder.resolve())
        try:
            measure(work, names, arguments.seeds)
        except Interrupted as error:
            raise SystemExit("interrupted; run the command again to go on") from error


def _smoke() -> None:
    with TemporaryDirectory() as folder:
        record = Record.at(Path(folder) / "smoke.jsonl")
        work = Work("smoke", noise(Path(folder) / "noise.npz", 256), record, Path(folder))
        measure(work, [PLAIN, "OREPA", "RepAn, distilled", LONGER], [0])
        print(page(Record.at(record.file).rows))


def noise(file: Path, images: int) -> Path:
    """Write a data set of random images, and a quarter as many for tests."""
    numbers = numpy.random.default_rng(0)
    arrays: dict[str, Callable[[int], Any]] = {
        "x": lambda count: numbers.integers(256, size=(count, 32, 32, 3), dtype=numpy.uint8),
        "y": lambda count: numpy.arange(count) % 10,
    }
    parts = {
        f"{name}_{part}": make(count)
        for part, count in (("train", images), ("test", images // 4))
        for name, make in arrays.items()
    }
    numpy.savez(file, **parts)
    return file


if __name__ == "__main__":
    main()

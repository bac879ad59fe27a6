"""Measure what 8 bits cost a fused net, by the branches that it was trained with.

    python -m benchmarks.quantization --data cifar10.npz --out benchmarks/results/quantization.json

A net like RepVGG-A0, but narrower and shallower, is trained as it is, with the branches of `repvgg` and with those of `qarepvgg`: same
data, same order, same recipe, with weight decay on all parameters. Each is fused, exported, and quantized with the same calibration images,
with one scale for each channel of a weight or for each tensor, and with 7 bits. Each net is compared with itself in float32: how many test
images get another class. The net is small and the training short, so the accuracies themselves are below those of the papers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import repfx
from benchmarks._record import Row, machine, write
from repfx.data.dataset import DataSource, Images, InputForm
from repfx.data.load import load_data
from repfx.onnx.quantization_report import QuantizationReport

FORMS: tuple[str | None, ...] = (None, "repvgg", "qarepvgg")
ROUNDINGS: dict[str, dict[str, Any]] = {
    "8 bits, a scale for each channel": {},
    "8 bits, a scale for each tensor": {"per_channel": False},
    "7 bits, a scale for each channel": {"reduce_range": True},
}
STAGES = ((16, 1, 2), (16, 2, 1), (32, 4, 2), (64, 8, 2), (128, 1, 1))  # channels, number of convs, stride of the first
BATCH, RATE, DECAY, CALIBRATION = 128, 0.1, 5e-4, 256
Split = tuple[Tensor, Tensor]


def net(classes: int) -> nn.Module:
    """A chain of 3×3 convs with BatchNorm and ReLU, and a linear layer."""
    layers: list[nn.Module] = []
    before = 3
    for channels, convs, stride in STAGES:
        for place in range(convs):
            conv = nn.Conv2d(before, channels, 3, stride if place == 0 else 1, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def evenly(images: Images, count: int) -> Split:
    """Take `count` images and labels, evenly spaced in a data set, or all if there are fewer."""
    total = len(images)  # type: ignore[arg-type]
    chosen = [images[place * total // min(count, total)] for place in range(min(count, total))]
    return torch.stack([x for x, _ in chosen]), torch.tensor([int(y) for _, y in chosen])


def train(model: nn.Module, data: Split, epochs: int, seed: int, rate: float = RATE) -> None:
    """Train by SGD with momentum. The rate rises for a tenth of the steps, then falls to zero by a cosine."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=DECAY)
    each = max(1, len(x) // BATCH)
    steps = epochs * each
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / math.ceil(steps / 10), (1 + math.cos(math.pi * done / steps)) / 2)
    )
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH)[:each]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            rates.step()
    model.eval()


def trained(form: str | None, data: Split, epochs: int, seed: int) -> nn.Module:
    """A net with these branches, or none."""
    torch.manual_seed(seed)
    model = net(int(data[1].max()) + 1)
    if form is not None:
        model = repfx.expand(model, form, preserve=False)
    train(model, data, epochs, seed)
    return model


def rows_of(model: nn.Module, calibrate: Tensor, test: Split) -> Iterator[tuple[str, QuantizationReport]]:
    """The net quantized in each way."""
    labelled = list(zip(test[0].split(250), test[1].split(250)))
    with TemporaryDirectory() as folder:
        exact, rounded = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        repfx.export_onnx(model, exact, test[0][:2])
        for name, options in ROUNDINGS.items():
            yield name, repfx.quantize_onnx(exact, rounded, [calibrate], labelled=labelled, **options)


def as_row(form: str | None, seed: int, name: str, report: QuantizationReport) -> Row:
    """One line of the result."""
    assert report.accuracy is not None
    convs = [layer for layer in report.layers if layer.operator == "Conv"]
    return {
        "form": form or "plain",
        "seed": seed,
        "rounding": name,
        "images": report.accuracy.images,
        "float32": report.accuracy.float32,
        "int8": report.accuracy.int8,
        "flips": report.accuracy.flips,
        "int8_here": report.accuracy.int8_here,
        "flips_here": report.accuracy.flips_here,
        "kernel_error": report.kernel_error,
        "lowest_sqnr": min(layer.output_sqnr for layer in convs),
        "lowest_weight_sqnr": min(layer.weight_sqnr for layer in convs),
        "largest_weight": max(layer.weight_range for layer in convs),
        "median_weight_range": median(layer.weight_range for layer in convs),
        "median_channel_spread": median(layer.channel_spread for layer in convs),
        "median_high": median(layer.high for layer in convs),
        "median_share": median(layer.share for layer in convs),
    }


def show(row: Row) -> list[str]:
    """A line of the printed table."""
    accuracies = [f"{float(row[name]):.2%}" for name in ("float32", "int8", "int8_here")]
    ranges = [f"{float(row[name]):.3g}" for name in ("lowest_sqnr", "median_weight_range", "median_high")]
    return [str(row["form"]), str(row["seed"]), str(row["rounding"]), *accuracies, str(row["flips"]), *ranges]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, an .npz file or a folder, as repfx train takes it")
    parser.add_argument("--size", type=int, help="side of the images")
    parser.add_argument("--images", type=int, default=15000, help="images to train on")
    parser.add_argument("--test", type=int, default=5000, help="images to test on")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one seed, one epoch of 256 images of the digits")
    options = parser.parse_args()
    if options.smoke:
        options.data, options.images, options.test, options.epochs, options.seeds = "digits", 256, 100, 1, 1
    data = load_data(DataSource(options.data), InputForm(channels=3, size=options.size))
    images, test = evenly(data.train, options.images), evenly(data.test, options.test)
    calibrate = evenly(data.train, CALIBRATION)[0]
    rows = []
    for seed in range(options.seeds):
        for form in FORMS:
            model = trained(form, images, options.epochs, seed)
            for name, report in rows_of(model, calibrate, test):
                rows.append(as_row(form, seed, name, report))
                print(*show(rows[-1]), sep=" | ", flush=True)
    table = Table(
        "form",
        "seed",
        "weights",
        "float32",
        "int8",
        "here",
        "flips",
        "SQNR",
        "weights to",
        "outputs to",
        box=SIMPLE_HEAD,
    )
    for row in rows:
        table.add_row(*show(row))
    Console(width=140).print(table)
    if options.out is not None and not options.smoke:
        setting = {
            "data": Path(options.data).stem,
            "images": len(images[0]),
            "input": " × ".join(map(str, images[0].shape[1:])),
            "epochs": options.epochs,
            "calibration": len(calibrate),
        }
        write(options.out, {**machine("cpu"), **setting}, rows)


if __name__ == "__main__":
    main()

"""Measure what 8 bits cost a fused net that was trained with branches, and what each way of rounding it takes back.

    python -m benchmarks.qat --data cifar10.npz --out benchmarks/results/qat-cifar10.jsonl

A chain of 17 convs is trained plain and with the branches of four presets: same data, same order, same recipe. Each net is fused, and
compared with itself in float32 on all test images:

- rounded after the training, with one scale for each channel of a weight or for each tensor;
- rounded after `equalize` and the correction of biases;
- trained on for some epochs with rounding, from the restored net, at a hundredth of the rate.

Training on teaches a net something even without rounding. So the restored net is also trained on in float32, in the same way. Each
training is one line of the file, written when it is done. If the command is run again, it does those that are missing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import repfx
from benchmarks._accuracy_record import Record
from benchmarks._record import machine
from benchmarks.quantization import CALIBRATION, RATE, Split, evenly, net, train
from repfx.data.dataset import DataSource, InputForm
from repfx.data.load import load_data
from repfx.onnx.file import open_session
from repfx.onnx.quantization_report import QuantizationReport
from repfx.passes.equalize import equalize
from repfx.qat.file import export_int8
from repfx.qat.rounded import rounded

FORMS: tuple[str, ...] = ("plain", "repvgg", "dbb", "qarepvgg", "orepa")
SHARE = 0.01  # of the training's rate, while the net is trained on
AT_ONCE = 250
Model = TypeVar("Model", bound=nn.Module)


def trained(form: str, data: Split, epochs: int, seed: int) -> nn.Module:
    """Return a net that was trained with these branches. What is linear in them runs as one conv, which changes nothing."""
    torch.manual_seed(seed)
    model = net(int(data[1].max()) + 1)
    if form != "plain":
        model = repfx.squeeze(repfx.expand(model, form, preserve=False))
    train(model, data, epochs, seed)
    return model


def trained_on(model: Model, data: Split, epochs: int, seed: int) -> Model:
    """Train a model on at a small rate."""
    train(model, data, epochs, seed, rate=SHARE * RATE)
    return model


def predicted(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the class of each image."""
    with torch.no_grad():
        return torch.cat([compute(part).argmax(1) for part in x.split(AT_ONCE)])


def in_file(path: Path) -> Callable[[Tensor], Tensor]:
    """Return a function that runs a file in onnxruntime, with its kernels for integers."""
    session = open_session(path, threads=1)
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def measure(form: str, seed: int, data: Split, test: Split, epochs: int, more: int) -> dict[str, Any]:
    """Train a net, round it in each way, and return a line of the result."""
    began = time.process_time()
    fused = repfx.fuse(trained(form, data, epochs, seed))
    seconds = {"training": time.process_time() - began}
    x, y = test
    calibrate = data[0][:: max(1, len(data[0]) // CALIBRATION)][:CALIBRATION]
    exact = predicted(fused, x)
    accuracy, flips, ranges = {"float32": _share(exact, y)}, {}, {}

    def note(way: str, found: Tensor) -> None:
        accuracy[way], flips[way] = _share(found, y), int((found != exact).sum())

    with TemporaryDirectory() as folder:
        for way, path, report in _rounded_afterwards(fused, calibrate, Path(folder)):
            note(way, predicted(in_file(path), x))
            ranges[way] = _ranges(report)
        began = time.process_time()
        model = trained_on(rounded(fused, calibrate), data, more, seed)
        seconds["trained with rounding"] = time.process_time() - began
        path = Path(folder) / "trained.onnx"
        agreement = export_int8(model, path, x[:64]).error
        note("trained with rounding", predicted(in_file(path), x))
        restored = repfx.restore(fused, calibrate=[calibrate])
        note("trained on in float32", predicted(trained_on(restored, data, more, seed), x))
    return {
        "form": form,
        "seed": seed,
        "images": len(y),
        "accuracy": accuracy,
        "flips": flips,
        "ranges": ranges,
        "file_error": agreement,
        "cpu_seconds": seconds,
    }


def _rounded_afterwards(
    fused: nn.Module, calibrate: Tensor, folder: Path
) -> Iterator[tuple[str, Path, QuantizationReport]]:
    """Write the files of the nets that are rounded after their training."""
    for name, model, correct in (("rounded", fused, False), ("evened out", equalize(fused), True)):
        exact = repfx.export_onnx(model, folder / f"{name}.onnx", calibrate[:2]).path
        for scales in ("channel", "tensor"):
            path = folder / f"{name} {scales}.onnx"
            per_channel = scales == "channel"
            report = repfx.quantize_onnx(exact, path, [calibrate], per_channel=per_channel, correct=correct)
            yield f"{name}, a scale for each {scales}", path, report


def _ranges(report: QuantizationReport) -> dict[str, float]:
    convs = [layer for layer in report.layers if layer.operator == "Conv"]
    return {
        "largest_weight": max(layer.weight_range for layer in convs),
        "median_weight_range": median(layer.weight_range for layer in convs),
        "median_channel_spread": median(layer.channel_spread for layer in convs),
        "median_high": median(layer.high for layer in convs),
        "median_share": median(layer.share for layer in convs),
        "lowest_weight_sqnr": min(layer.weight_sqnr for layer in convs),
        "lowest_sqnr": min(layer.output_sqnr for layer in convs),
        "kernel_error": report.kernel_error,
    }


def _share(found: Tensor, y: Tensor) -> float:
    return float((found == y).double().mean())


def show(rows: list[dict[str, Any]]) -> Table:
    """The table of all rows, averaged over seeds: accuracy in float32, and what each way changes, in points."""
    ways = [way for way in rows[0]["accuracy"] if way != "float32"]
    table = Table("branches", "runs", "float32", *ways, box=SIMPLE_HEAD)
    for form in dict.fromkeys(row["form"] for row in rows):
        own = [row["accuracy"] for row in rows if row["form"] == form]
        cells = [f"{mean(each[way] - each['float32'] for each in own):+.2%}" for way in ways]
        table.add_row(form, str(len(own)), f"{mean(each['float32'] for each in own):.2%}", *cells)
    return table


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, an .npz file or a folder, as repfx train takes it")
    parser.add_argument("--images", type=int, default=16000, help="images to train on")
    parser.add_argument("--test", type=int, default=10000, help="images to test on")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--more", type=int, default=2, help="epochs in which a net is trained on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file of the trainings, one a line")
    parser.add_argument(
        "--smoke", action="store_true", help="one seed of repvgg, one epoch of 256 images of the digits"
    )
    options = parser.parse_args()
    forms = FORMS
    if options.smoke:
        options.data, options.images, options.test, options.seeds, options.out = "digits", 256, 100, 1, None
        options.epochs, options.more, forms = 1, 1, FORMS[1:2]
    data = load_data(DataSource(options.data), InputForm(channels=3, size=None))
    images, test = evenly(data.train, options.images), evenly(data.test, options.test)
    setting = {
        "data": Path(options.data).stem,
        "epochs": options.epochs,
        "more": options.more,
        "training_images": len(images[0]),
    }
    record = Record(Path()) if options.out is None else Record.at(options.out)
    for seed in range(options.seeds):
        for form in forms:
            if any((row["form"], row["seed"]) == (form, seed) for row in record.rows):
                continue
            row = {**setting, **measure(form, seed, images, test, options.epochs, options.more), **machine("cpu")}
            print(json.dumps(row["accuracy"]), flush=True)
            record.rows.append(row) if options.out is None else record.add(row)
    Console(width=200).print(show(record.rows))


if __name__ == "__main__":
    main()

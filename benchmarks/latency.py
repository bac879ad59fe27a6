"""Measure whether a fused model is as fast as the same architecture written by hand.

    python -m benchmarks.latency --out benchmarks/results/latency-cpu.json

For each model, in one process and in turns: the twin written by hand without any BatchNorm, that twin once more (which shows
how far two equal programs are apart here), the fused model, the model with its BatchNorms, and the expanded model. Twin and
fused model are given the same weights, and must agree, before anything is measured.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
import torchvision
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import repfx
from benchmarks._comparison import Measurement, compare
from benchmarks._record import machine, write
from repfx.measuring.cost import count_macs, measure_times
from repfx.onnx.free_axes import FreeAxes
from repfx.onnx.program import write_program
from repfx.testing import randomize_batch_norm, relative_error

TWIN, AGAIN, FUSED, UNFUSED, EXPANDED = "by hand", "by hand, again", "fused", "conv + BatchNorm", "expanded"


@dataclass(frozen=True)
class Subject:
    """A model, what it is expanded with, and how one would write it without BatchNorm."""

    name: str
    spec: str
    build: Callable[[], nn.Module]
    by_hand: Callable[[], nn.Module]


def no_norm(channels: int) -> nn.Module:
    """The layer in place of a BatchNorm in a model without any."""
    return nn.Identity()


def with_biases(model: nn.Module) -> nn.Module:
    """Give each conv of `model` a bias, as one writes a conv that no BatchNorm follows."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
    return model


MODELS = torchvision.models
SUBJECTS = (
    Subject("resnet18", "dbb", MODELS.resnet18, lambda: with_biases(MODELS.resnet18(norm_layer=no_norm))),
    Subject("vgg16_bn", "acb", MODELS.vgg16_bn, MODELS.vgg16),
    Subject("mobilenet_v2", "dbb", MODELS.mobilenet_v2, lambda: with_biases(MODELS.mobilenet_v2(norm_layer=no_norm))),
)


@torch.no_grad()
def forms(subject: Subject, x: Tensor) -> dict[str, nn.Module]:
    """The five forms of a model, of which the fused one and its twin are shown to be the same function."""
    model = randomize_batch_norm(subject.build()).eval()
    expanded = randomize_batch_norm(repfx.expand(model, subject.spec), seed=1).eval()
    fused = repfx.fuse(expanded)
    twin = subject.by_hand().eval()
    for ours, theirs in zip(fused.parameters(), twin.parameters(), strict=True):
        theirs.copy_(ours)
    assert relative_error(twin(x), fused(x)) < 1e-4, f"{subject.name} isn't written by hand as it is fused"
    assert count_macs(twin, x) == count_macs(fused, x)
    return {TWIN: twin, AGAIN: copy.deepcopy(twin), FUSED: fused, UNFUSED: model, EXPANDED: expanded}


def in_torch(
    models: Mapping[str, nn.Module], x: Tensor, memory_format: torch.memory_format
) -> dict[str, Callable[[], Any]]:
    """Calls of copies of the models in this memory format, on the device of `x`."""
    laid_out = x.contiguous(memory_format=memory_format)
    return {
        name: partial(copy.deepcopy(model).to(x.device, memory_format=memory_format), laid_out)  # type: ignore[call-overload]
        for name, model in models.items()
    }


def in_onnxruntime(models: Mapping[str, nn.Module], x: Tensor, folder: Path) -> dict[str, Callable[[], Any]]:
    """Calls of the exported models, each with all optimizations of onnxruntime and as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        file = folder / f"{name}.onnx"
        write_program(copy.deepcopy(model), x, file, free=FreeAxes(), opset=None, outputs=["output"])
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        calls[name] = partial(session.run, None, {session.get_inputs()[0].name: x.numpy()})
    return calls


def compiled(models: Mapping[str, nn.Module], x: Tensor, backend: str = "inductor") -> dict[str, Callable[[], Any]]:
    """Calls of copies of the models under `torch.compile`; inductor chooses the memory format by itself."""
    torch.compiler.reset()  # otherwise calls for the next subject check the guards of these models, too
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        calls[name] = partial(torch.compile(copy.deepcopy(model).to(x.device), fullgraph=True, backend=backend), x)
        calls[name]()  # compile
    return calls


Runtime = Callable[[Mapping[str, nn.Module], Tensor, Path], dict[str, Callable[[], Any]]]
RUNTIMES: dict[str, Runtime] = {
    "torch": lambda models, x, folder: in_torch(models, x, torch.contiguous_format),
    "channels last": lambda models, x, folder: in_torch(models, x, torch.channels_last),
    "compiled": lambda models, x, folder: compiled(models, x),
    "onnxruntime": in_onnxruntime,
}


def traced(models: Mapping[str, nn.Module], x: Tensor, folder: Path) -> dict[str, Callable[[], Any]]:
    """Calls of the models under `torch.compile` with the eager backend, which compiles quickly, for a smoke run."""
    return compiled(models, x, backend="eager")


@torch.inference_mode()
def measure(subject: Subject, x: Tensor, rounds: int, runtimes: Mapping[str, Runtime]) -> dict[str, list[Measurement]]:
    """The five forms compared in each runtime."""
    models = forms(subject, x.cpu())
    with TemporaryDirectory() as folder:
        calls = {name: runtime(models, x, Path(folder)) for name, runtime in runtimes.items()}
    return {name: compare(measure_times(each, rounds=rounds), TWIN) for name, each in calls.items()}


def as_row(subject: Subject, runtime: str, found: Measurement) -> dict[str, str | float]:
    """One line of the result."""
    return {
        "model": subject.name,
        "spec": subject.spec,
        "runtime": runtime,
        "form": found.candidate,
        "milliseconds": round(found.seconds * 1e3, 3),
        **found.ratio.rounded(),
    }


def show(rows: list[dict[str, str | float]]) -> None:
    """Print the rows as a table."""
    table = Table("model", "runtime", "form", "ms", "ratio", "95 %", box=SIMPLE_HEAD)
    for row in rows:
        names = [str(row[key]) for key in ("model", "runtime", "form")]
        interval = f"{row['low']:.3f}–{row['high']:.3f}"
        table.add_row(*names, f"{row['milliseconds']:.2f}", f"{row['ratio']:.3f}", interval)
    Console(width=92).print(table)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description="Latency of fused models beside the same models written by hand.")
    parser.add_argument("--out", type=Path, help="file for the result")
    parser.add_argument("--rounds", type=int, default=100, help="turns that count")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=RUNTIMES,
        default=list(RUNTIMES),
        help="runtimes to measure; onnxruntime is left out on a GPU",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--smoke", action="store_true", help="one model, small, few turns: does it run?")
    options = parser.parse_args()
    subjects, size, rounds = (SUBJECTS[:1], 32, 3) if options.smoke else (SUBJECTS, options.size, options.rounds)
    known = {**RUNTIMES, "compiled": traced} if options.smoke else RUNTIMES
    runtimes = {name: known[name] for name in options.runtimes if name != "onnxruntime" or options.device == "cpu"}

    torch.manual_seed(0)
    x = torch.randn(options.batch, 3, size, size, device=options.device)
    rows = [
        as_row(subject, runtime, found)
        for subject in subjects
        for runtime, measurements in measure(subject, x, rounds, runtimes).items()
        for found in measurements
    ]
    show(rows)
    if options.out:
        write(options.out, {**machine(options.device), "input": " × ".join(map(str, x.shape))}, rows)


if __name__ == "__main__":
    main()

"""Compare files that ONNX optimizers make of an unfused model with the fused model's file.

    python -m benchmarks.deployment --out benchmarks/results/deployment-cpu.json

Nets that have branches in training, in eval mode with random BatchNorms, are exported twice by the same function, fused and unfused. The
unfused file is then optimized by onnxsim and by onnxslim. Before anything is measured, all files must give the model's output in torch,
to 1e-4 of the largest output. Each runs in onnxruntime with all of its own optimizations, batch 1, in turns. *Unfused* is the file that
onnxruntime alone optimizes; *fused, again* shows how far the times of two equal files are apart here.

torch's exporter already merges each conv with the BatchNorm behind it, so no file has these left. BatchNorms behind a sum, a pool, a
padding or the input of a branch are still in the unfused files. onnxruntime runs some of them as depthwise convs, so it can run more
convs than a file has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnxruntime
import timm
import torch
import torchvision
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import repfx
from benchmarks._comparison import Measurement, compare
from benchmarks._record import Row, machine, write
from repfx.errors import first_line
from repfx.measuring.cost import measure_times
from repfx.onnx.free_axes import FreeAxes
from repfx.onnx.program import quiet, write_program
from repfx.testing import randomize_batch_norm, relative_error

FORMS = FUSED, AGAIN, UNFUSED = "fused", "fused, again", "unfused"
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Subject:
    """A model with branches, and the side of its images."""

    name: str
    build: Callable[[], nn.Module]
    size: int = 224


def of_timm(name: str, size: int = 224) -> Subject:
    """A model of timm in its training form."""
    return Subject(name, partial(timm.create_model, name), size)


SUBJECTS = (
    of_timm("repvgg_a0"),
    of_timm("mobileone_s0"),
    of_timm("fastvit_t8", 256),
    of_timm("ghostnetv3_100"),
    Subject("resnet18, dbb", lambda: repfx.expand(torchvision.models.resnet18(), "dbb")),
)


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """Optimize a file by onnxsim."""
    import onnxsim  # not available for Python 3.10

    optimized: onnx.ModelProto = onnxsim.simplify(model)[0]
    return optimized


def slimmed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Optimize a file by onnxslim."""
    import onnxslim

    optimized: onnx.ModelProto = onnxslim.slim(model)
    return optimized


OPTIMIZERS: Mapping[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {"onnxsim": simplified, "onnxslim": slimmed}


@dataclass(frozen=True)
class Candidate:
    """A file that onnxruntime has opened.

    Args:
        call: runs the file once.
        convs: of the file.
        convs_run: convs that are left when onnxruntime has optimized the file.
        error: of the file's output, relative to torch's.
    """

    call: Callable[[], Any]
    convs: int
    convs_run: int
    error: float


def count_convs(model: onnx.ModelProto) -> int:
    """Count the convs of a file, or of the file that onnxruntime has optimized."""
    return sum(node.op_type in ("Conv", "FusedConv") for node in model.graph.node)


def opened(file: Path, x: Tensor, expected: Tensor) -> Candidate:
    """Open a file with all optimizations of onnxruntime and as many threads as torch has.

    Raises:
        AssertionError: the file's output differs from torch's.
    """
    optimized = file.with_suffix(".optimized.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3  # otherwise it warns that such a file is for this machine only
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    call = partial(session.run, None, {session.get_inputs()[0].name: x.numpy()})
    error = relative_error(torch.from_numpy(call()[0]), expected)
    assert error < TOLERANCE, f"the output is off by {error:.1e}"
    return Candidate(call, count_convs(onnx.load(file)), count_convs(onnx.load(optimized)), error)


def exported(model: nn.Module, x: Tensor, file: Path) -> Path:
    """The file of a model as it is."""
    write_program(model, x, file, free=FreeAxes(), opset=None, outputs=["output"])
    return file


def attempt(optimizer: str, unfused: Path, x: Tensor, expected: Tensor) -> Candidate | str:
    """The file that an optimizer makes, or why there is none."""
    file = unfused.with_stem(optimizer)
    try:
        with quiet():
            onnx.save(OPTIMIZERS[optimizer](onnx.load(unfused)), file)
        return opened(file, x, expected)
    except Exception as error:
        return f"fails: {first_line(error)}"


@torch.no_grad()
def prepare(subject: Subject, x: Tensor, folder: Path) -> dict[str, Candidate | str]:
    """All files of a model, by the tool that made them."""
    model = randomize_batch_norm(subject.build()).eval()
    expected = model(x)
    fused = exported(repfx.fuse(model), x, folder / "fused.onnx")
    unfused = exported(model, x, folder / "unfused.onnx")
    found: dict[str, Candidate | str] = {
        FUSED: opened(fused, x, expected),
        AGAIN: opened(fused, x, expected),
        UNFUSED: opened(unfused, x, expected),
    }
    return found | {name: attempt(name, unfused, x, expected) for name in OPTIMIZERS}


def as_row(subject: Subject, form: str, candidate: Candidate, found: Measurement) -> Row:
    """One line of the result."""
    return {
        "model": subject.name,
        "form": form,
        "convs": candidate.convs,
        "convs_run": candidate.convs_run,
        "error": float(f"{candidate.error:.1e}"),
        "milliseconds": round(found.seconds * 1e3, 3),
        **found.ratio.rounded(),
    }


def measure(subject: Subject, rounds: int) -> list[Row]:
    """One row for each file of a model."""
    x = torch.randn(1, 3, subject.size, subject.size)
    with TemporaryDirectory() as folder:
        prepared = prepare(subject, x, Path(folder))
    candidates = {form: each for form, each in prepared.items() if isinstance(each, Candidate)}
    times = measure_times({form: each.call for form, each in candidates.items()}, rounds=rounds)
    rows = [as_row(subject, found.candidate, candidates[found.candidate], found) for found in compare(times, FUSED)]
    failures = {form: each for form, each in prepared.items() if isinstance(each, str)}
    return rows + [{"model": subject.name, "form": form, "problem": why} for form, why in failures.items()]


def installed(package: str) -> str:
    """The version of a package, or that it isn't installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def show(rows: list[Row]) -> None:
    """Print the rows as a table."""
    table = Table("model", "form", "convs", "convs run", "ms", "ratio", "95 %", box=SIMPLE_HEAD)
    for row in rows:
        names = [str(row[key]) for key in ("model", "form")]
        if "problem" in row:
            table.add_row(*names, str(row["problem"]))
            continue
        convs = [str(row[key]) for key in ("convs", "convs_run")]
        interval = f"{row['low']:.3f}–{row['high']:.3f}"
        table.add_row(*names, *convs, f"{row['milliseconds']:.2f}", f"{row['ratio']:.3f}", interval)
    Console(width=110).print(table)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the result")
    parser.add_argument("--rounds", type=int, default=31, help="turns that count")
    parser.add_argument("--smoke", action="store_true", help="one model, small, few turns: does it run?")
    options = parser.parse_args()
    subjects, rounds = ((of_timm("repvgg_a0", 32),), 3) if options.smoke else (SUBJECTS, options.rounds)

    torch.manual_seed(0)
    rows = [row for subject in subjects for row in measure(subject, rounds)]
    show(rows)
    if options.out:
        tools = {name: installed(name) for name in ("timm", "onnxsim", "onnxslim")}
        write(options.out, {**machine("cpu"), **tools}, rows)


if __name__ == "__main__":
    main()

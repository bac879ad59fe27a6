"""Compare `fuse_onnx` with other tools that optimize ONNX files, in onnxruntime and in OpenVINO.

    python -m benchmarks.onnx_files --out benchmarks/results/onnx-files-cpu.json

Nets in their training form, in eval mode with random BatchNorms, are exported as they are: all branches and BatchNorms are in the file.
Each tool gets this file. Before anything is measured, each result must give the file's own output, to 1e-4 of the largest output.
All files run in turns, batch 1. onnxruntime applies all its optimizations to each of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
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
from benchmarks._comparison import compare
from benchmarks._record import Row, machine, write
from benchmarks.deployment import count_convs, installed, simplified, slimmed
from repfx.errors import first_line
from repfx.measuring.cost import measure_times
from repfx.onnx.file import package
from repfx.onnx.program import quiet
from repfx.testing import randomize_batch_norm, relative_error

SOURCE, FUSED = "as exported", "repfx"
TOLERANCE = 1e-4
SUBJECTS: Mapping[str, Callable[[], nn.Module]] = {
    "repvgg_a0": partial(timm.create_model, "repvgg_a0"),
    "mobileone_s0": partial(timm.create_model, "mobileone_s0"),
    "resnet18, dbb": lambda: repfx.expand(torchvision.models.resnet18(), "dbb"),
}


def export(model: nn.Module, x: Tensor, file: Path) -> None:
    """Write a model in its training form."""
    options: dict[str, Any] = {
        "dynamo": False,
        "training": torch.onnx.TrainingMode.PRESERVE,
        "do_constant_folding": False,
    }
    with quiet():
        torch.onnx.export(model, (x,), file, opset_version=17, **options)


def fused(source: Path, file: Path) -> None:
    """Write what repfx makes of a file."""
    repfx.fuse_onnx(source, file)


def by_function(optimize: Callable[[onnx.ModelProto], onnx.ModelProto], source: Path, file: Path) -> None:
    """Write what a function makes of a file."""
    onnx.save(optimize(onnx.load(source)), file)


def by_onnxruntime(source: Path, file: Path) -> None:
    """Write what onnxruntime's optimizations for any machine make of a file."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(file)
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def by_onnxscript(source: Path, file: Path) -> None:
    """Write what the optimizer of onnxscript makes of a file."""
    import onnxscript.optimizer

    onnx.save(onnxscript.optimizer.optimize(onnx.load(source)), file)


TOOLS: Mapping[str, Callable[[Path, Path], None]] = {
    FUSED: fused,
    "onnxsim": partial(by_function, simplified),
    "onnxslim": partial(by_function, slimmed),
    "onnxruntime, offline": by_onnxruntime,
    "onnxscript": by_onnxscript,
}


def in_onnxruntime(file: Path, x: Tensor) -> Callable[[], Any]:
    """Return a call of a file in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: x.numpy()})


def in_openvino(file: Path, x: Tensor) -> Callable[[], Any]:
    """Return a call of a file in OpenVINO, which computes in float32 here."""
    compiled = package("openvino").Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    return lambda: [*request.infer([x.numpy()]).values()]


RUNTIMES: Mapping[str, Callable[[Path, Tensor], Callable[[], Any]]] = {
    "onnxruntime": in_onnxruntime,
    "OpenVINO": in_openvino,
}


def measure(name: str, build: Callable[[], nn.Module], size: int, rounds: int) -> list[Row]:
    """One row for each file of a model in each runtime."""
    x = torch.randn(1, 3, size, size)
    with TemporaryDirectory() as folder:
        source = Path(folder) / "source.onnx"
        export(randomize_batch_norm(build()).eval(), x, source)
        expected = torch.from_numpy(in_onnxruntime(source, x)()[0])
        rows: list[Row] = []
        files = {SOURCE: source}
        for tool, run in TOOLS.items():
            file = source.with_stem(f"by_{len(files)}")
            try:
                with quiet():
                    run(source, file)
                files[tool] = file
            except Exception as error:
                rows.append({"model": name, "tool": tool, "problem": first_line(error)})
        for runtime, opened in RUNTIMES.items():
            calls = {tool: opened(file, x) for tool, file in files.items()}
            errors = {tool: relative_error(torch.from_numpy(call()[0]), expected) for tool, call in calls.items()}
            assert max(errors.values()) < TOLERANCE, f"{name} in {runtime}: {errors}"
            times = measure_times(calls, rounds=rounds)
            rows += [
                {
                    "model": name,
                    "tool": each.candidate,
                    "runtime": runtime,
                    "convs": count_convs(onnx.load(files[each.candidate])),
                    "nodes": len(onnx.load(files[each.candidate]).graph.node),
                    "error": float(f"{errors[each.candidate]:.1e}"),
                    "milliseconds": round(each.seconds * 1e3, 3),
                    **each.ratio.rounded(),
                }
                for each in compare(times, SOURCE)
            ]
    return rows


def show(rows: list[Row]) -> None:
    """Print the rows as a table."""
    columns = ("model", "tool", "runtime", "convs", "nodes", "milliseconds", "ratio")
    table = Table(*columns, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(str(row.get(column, row.get("problem", ""))) for column in columns))
    Console(width=120).print(table)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the result")
    parser.add_argument("--rounds", type=int, default=31, help="turns that count")
    parser.add_argument("--smoke", action="store_true", help="one model, small, few turns: does it run?")
    options = parser.parse_args()
    names = ["repvgg_a0"] if options.smoke else [*SUBJECTS]
    size, rounds = (32, 3) if options.smoke else (224, options.rounds)

    torch.manual_seed(0)
    rows = [row for name in names for row in measure(name, SUBJECTS[name], size, rounds)]
    show(rows)
    if options.out and not options.smoke:
        tools = {name: installed(name) for name in ("timm", "onnxsim", "onnxslim", "onnxscript", "openvino")}
        write(options.out, {**machine("cpu"), **tools}, rows)


if __name__ == "__main__":
    main()

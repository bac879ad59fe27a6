"""An ONNX file: its inputs and outputs, and a session that runs it in onnxruntime."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from repfx.errors import ExportError, first_line
from repfx.onnx.program import reason

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Value:
    """An input or output of an ONNX file; `shape` holds a name in place of the size of a free axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class OnnxFile:
    """The contents of a valid ONNX file, without its weights.

    Args:
        opset: version of ONNX's operators.
        inputs: inputs of the file.
        outputs: outputs of the file.
        nodes: number of nodes of each operator.
    """

    opset: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    nodes: dict[str, int]

    @classmethod
    def read(cls, path: Path) -> OnnxFile:
        """Check a file and read all but its weights.

        Raises:
            ExportError: onnx finds the file invalid.
        """
        onnx = package("onnx")
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as invalid:
            raise ExportError(f"onnx finds the file invalid: {first_line(invalid)}.") from invalid
        model = onnx.load(path, load_external_data=False)
        return cls(
            opset=next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
            inputs=tuple(map(_value, model.graph.input)),
            outputs=tuple(map(_value, model.graph.output)),
            nodes=dict(Counter(node.op_type for node in model.graph.node)),
        )


def require_packages(purpose: str = "exporting", names: Iterable[str] = PACKAGES) -> None:
    """Import the packages that read, write and run ONNX files.

    Raises:
        ExportError: a package is missing.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(f"{purpose} needs {name}, which can't be imported: pip install 'repfx[onnx]'.") from error


def package(name: str) -> ModuleType:
    """Import an optional package at the moment it is needed."""
    return importlib.import_module(name)


def open_session(
    path: Path | str | bytes, *, optimized: bool = True, threads: int = 0, profile: Path | None = None
) -> Any:
    """Open a file in onnxruntime on the CPU, without its log messages.

    Args:
        optimized: whether onnxruntime may replace nodes by faster ones, such as quantized ones by kernels for integers.
        threads: how many threads run a node; 0 leaves that to onnxruntime.
        profile: beginning of the path of a file in which onnxruntime's profiler notes each run; None leaves the profiler out.
    """
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if not optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def runtime_reason(error: Exception) -> str:
    """Why onnxruntime fails, in one sentence without its full stop."""
    text = str(error)
    newest = re.search(r"Current official support for domain ai.onnx is till opset (\d+)", text)
    if newest:
        return f"it supports opsets up to {newest[1]}"
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .* failed:\s*)?", "", reason(error))


def _value(value: Any) -> Value:
    tensor = value.type.tensor_type
    dtype = package("onnx").TensorProto.DataType.Name(tensor.elem_type).lower()
    return Value(value.name, dtype, tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim))

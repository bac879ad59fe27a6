"""A model as an ONNX file: fused, exported, and run in onnxruntime against the torch model before the file appears."""

from __future__ import annotations

import copy
import importlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from repfx.difference import Difference, count_numbers, differences, leaves, worst
from repfx.equivalence import TOLERANCES
from repfx.errors import ExportError, InvalidInput, first_line
from repfx.module_tree import require_module
from repfx.onnx_program import quiet, reason, write_program
from repfx.passes.fuse import fuse
from repfx.precision import Inputs, as_arguments, describe, double_copy, map_tensors, run_double, seeded
from repfx.target_file import staged

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Value:
    """An input or output of an ONNX file; an axis of free size is given by name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class ExportReport:
    """What `export_onnx` wrote.

    Args:
        path: the file.
        max_error: the worst ``max |a - b| / max |a|`` between the fused model's outputs a and onnxruntime's b.
        tolerance: what `max_error` was held against.
        opset: version of ONNX's operators.
        inputs: what the file takes.
        outputs: what it gives.
        size: bytes, with the weights beside the file where it is too large for one.
        nodes: how often each operator occurs.
    """

    path: Path
    max_error: float
    tolerance: float
    opset: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    size: int
    nodes: Mapping[str, int]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.nodes.items(), key=lambda item: -item[1]))
        return "\n".join(
            [
                f"{self.path} ({self.size / 1e6:.2f} MB, opset {self.opset})",
                f"  takes   {'; '.join(map(str, self.inputs))}",
                f"  gives   {'; '.join(map(str, self.outputs))}",
                f"  nodes   {counts}",
                f"  differs {self.max_error:.1e} from torch in onnxruntime (allowed {self.tolerance:.0e})",
            ]
        )


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    x: Inputs,
    *,
    dynamic_batch: bool = True,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Fuse a model, export it in eval mode and its own dtype, and run the file in onnxruntime on x before it is kept.

    The model stays as it is. With a free batch size a second batch, of another size, is compared as well. The file
    appears at `path` only when all of this has passed; one that was there is replaced in one step.

    Args:
        model: any model; what can't be fused is exported as it is.
        path: of the file, ending in ``.onnx``; its folder exists.
        x: an example: a tensor, a tuple of positional inputs, a dict of keyword inputs, or a list that is one input.
        dynamic_batch: leave the first axis free, of every tensor in x that is as long there as the first one is.
        opset: version of ONNX's operators; None takes torch's.
        tolerance: allowed ``max |a - b| / max |a|`` for each output a of the fused model. 1e-4 leaves room for another
            order of summation in float32. Where torch's own output is that far from the one in float64, four times that is
            allowed, up to a hundred times the tolerance. Float16 is allowed at least 1e-1, as `check_equivalent` does.

    Raises:
        InvalidInput: the path can't be written, or the model can't run on x.
        ExportError: the model can't be exported, onnxruntime can't run it or gives something else, or a package is
            missing (``pip install 'repfx[onnx]'``).
    """
    require_module(model)
    if not tolerance > 0:
        raise InvalidInput(f"tolerance is {tolerance}: it must be a number above 0.")
    with staged(path, ".onnx") as (target, staging):
        _require_packages()
        _check_opset(opset)
        x = map_tensors(lambda tensor: tensor.detach().to(CPU, copy=True), x)
        deployed = copy.deepcopy(fuse(model)).to(CPU).eval()
        expected = _run_torch(deployed, x)
        batched = _batched(x) if dynamic_batch else []
        example = x
        if batched and len(batched[0]) == 1:
            # torch.export takes a size of 1 for a constant.
            example, batched = _resized(x, batched, 2)
        outputs = _output_names(expected, x)
        write_program(deployed, example, staging, batched=batched, opset=opset, outputs=outputs)
        bound = _bound(deployed, tolerance)
        runs = [(x, expected)]
        if batched:
            other, _ = _resized(example, batched, len(batched[0]) + 1)
            runs.append((other, _run_torch(deployed, other)))
        found = [_difference(staging, deployed, *each) for each in runs]
        if worst(found).error > bound:
            rounding = max(_rounding(deployed, *each) for each in runs)
            bound = max(bound, min(4 * rounding, 100 * tolerance))
        report = _report(target, staging, worst(found).error, bound)
        if not worst(found).error <= bound:
            raise ExportError(_mismatch(worst(found), bound))
        if opset is not None and report.opset != opset:
            raise ExportError(
                f"torch wrote opset {report.opset} and can't convert it to opset {opset}: leave opset out."
            )
    return report


def _require_packages() -> None:
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(f"exporting needs {name}, which can't be imported: pip install 'repfx[onnx]'.") from error


def _check_opset(opset: int | None) -> None:
    newest = _package("onnx").defs.onnx_opset_version()
    if opset is not None and not (isinstance(opset, int) and 1 <= opset <= newest):
        raise InvalidInput(f"there is no opset {opset!r}: the installed onnx knows 1 to {newest}.")


def _package(name: str) -> ModuleType:
    return importlib.import_module(name)


def _run_torch(model: nn.Module, x: Inputs) -> dict[str, Tensor]:
    """The model's output tensors by name."""
    args, kwargs = as_arguments(map_tensors(torch.clone, x))  # a ReLU in place may write over its input
    try:
        with torch.no_grad(), seeded(model), quiet():
            outputs = model(*args, **kwargs)
    except Exception as error:
        raise InvalidInput(f"the model can't run on x = {describe(x)}: {first_line(error)}.") from error
    if not count_numbers(outputs):
        raise InvalidInput(f"the model gives no numbers for x = {describe(x)}, so the file could not be checked.")
    return {where: leaf for where, leaf in leaves(outputs) if isinstance(leaf, Tensor)}


def _bound(model: nn.Module, tolerance: float) -> float:
    is_half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    return max(tolerance, TOLERANCES[torch.float16]) if is_half else tolerance


def _rounding(model: nn.Module, x: Inputs, expected: Mapping[str, Tensor]) -> float:
    """How far torch's own outputs are from those in float64, relatively; 0 where that can't be said."""
    exact = [leaf for _, leaf in leaves(run_double(double_copy(model), x)) if isinstance(leaf, Tensor)]
    found = worst(differences(exact, list(expected.values())))
    return 0.0 if found.problem else found.error


def _tensors(x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, x)  # type: ignore[func-returns-value]
    return found


def _batched(x: Inputs) -> list[Tensor]:
    """The tensors whose first axis is the batch: as long as that of the first tensor."""
    tensors = [tensor for tensor in _tensors(x) if tensor.dim()]
    return [tensor for tensor in tensors if len(tensor) == len(tensors[0])]


def _resized(x: Inputs, batched: Sequence[Tensor], size: int) -> tuple[Any, list[Tensor]]:
    """x with a batch of another size, from the same samples in reversed order."""
    resized = {id(tensor): tensor.flip(0)[torch.arange(size) % len(tensor)] for tensor in batched}
    return map_tensors(lambda tensor: resized.get(id(tensor), tensor), x), list(resized.values())


def _output_names(outputs: Mapping[str, Tensor], x: Inputs) -> list[str]:
    """``output`` for one tensor, ``output_0`` … for a tuple, and the keys of a dict unless an input is called so."""
    if list(outputs) == ["output 0"]:
        return ["output"]
    names = ["_".join(re.findall(r"\w+", where.removeprefix("output "))) for where in outputs]
    plain = all(re.match(r"[A-Za-z_]", name) for name in names) and len(set(names)) == len(names)
    return names if plain and not isinstance(x, Mapping) else [f"output_{name}" for name in names]


def _difference(path: Path, model: nn.Module, x: Inputs, expected: Mapping[str, Tensor]) -> Difference:
    """The worst difference between torch's outputs and onnxruntime's."""
    runtime = _package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), _tensors(x), strict=True)}
        given = session.run(None, feeds)
    except Exception as error:
        dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
        advice = "" if dtypes <= {"float32"} else f"; its weights are {', '.join(sorted(dtypes))}: try model.float()"
        raise ExportError(
            f"onnxruntime can't run the exported model on {describe(x)}: {_runtime_reason(error)}{advice}."
        ) from error
    return worst(differences(list(expected.values()), [torch.from_numpy(output) for output in given]))


def _runtime_reason(error: Exception) -> str:
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .* failed:\s*)?", "", reason(error))


def _mismatch(found: Difference, bound: float) -> str:
    if found.problem:
        return f"onnxruntime gives something else than torch: {found.problem} ('model' being the file)."
    return (
        f"onnxruntime gives something else than torch: worst relative difference {found.error:.1e} "
        f"(allowed {bound:.0e}) at {found.where}."
    )


def _report(target: Path, staging: Path, error: float, bound: float) -> ExportReport:
    onnx = _package("onnx")
    try:
        onnx.checker.check_model(str(staging))
    except onnx.checker.ValidationError as invalid:
        raise ExportError(f"torch wrote a file that onnx finds invalid: {first_line(invalid)}.") from invalid
    model = onnx.load(staging, load_external_data=False)
    return ExportReport(
        path=target,
        max_error=error,
        tolerance=bound,
        opset=next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        inputs=tuple(map(_value, model.graph.input)),
        outputs=tuple(map(_value, model.graph.output)),
        size=sum(file.stat().st_size for file in staging.parent.iterdir()),
        nodes=dict(Counter(node.op_type for node in model.graph.node)),
    )


def _value(value: Any) -> Value:
    tensor = value.type.tensor_type
    dtype = _package("onnx").TensorProto.DataType.Name(tensor.elem_type).lower()
    return Value(value.name, dtype, tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim))

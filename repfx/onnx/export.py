"""A model as an ONNX file: fused, exported, and compared with torch in onnxruntime before the file appears."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from repfx.errors import ExportError, InvalidInput
from repfx.measuring.in_float64 import Inputs, describe
from repfx.onnx.file import OnnxFile, Value, open_session, package, require_packages, runtime_reason
from repfx.onnx.finishing import finish
from repfx.onnx.free_axes import AxisNames, tensors_of
from repfx.onnx.metadata import Metadata, origin_of
from repfx.onnx.opset import LOWEST
from repfx.onnx.prepared import Prepared, mismatch
from repfx.onnx.preprocessing import Preprocessing
from repfx.onnx.program import write_program
from repfx.onnx.raw_images import IMAGES, LOGITS, NORMALIZED
from repfx.records.generators import random_state_kept
from repfx.records.module_tree import require_module
from repfx.records.target_file import staged


@dataclass(frozen=True)
class ExportReport:
    """The report of `export_onnx` on the file that it wrote.

    Args:
        path: the file.
        max_error: the worst ``max |a - b| / max |a|`` between the fused model's outputs a and onnxruntime's outputs b.
        tolerance: the largest `max_error` that was allowed.
        opset: version of ONNX's operators.
        inputs: inputs of the file.
        outputs: outputs of the file.
        size: bytes of the file, including weights stored beside it if they are too large for one file.
        nodes: number of nodes of each operator.
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
    dynamic_size: bool = False,
    dynamic_axes: AxisNames | None = None,
    dtype: torch.dtype | None = None,
    opset: int | None = None,
    tolerance: float = 1e-4,
    labels: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
    inside: bool = False,
    probabilities: bool = False,
    about: Mapping[str, str] | None = None,
) -> ExportReport:
    """Fuse a model, export it in eval mode to an ONNX file, and keep the file only if onnxruntime agrees with torch on x.

    `export_onnx` doesn't change the model. If axes are free, it also compares a second input, which differs in size along all of
    them. The file appears at `path` only after all of this has passed. It replaces an older file in one step.

    Args:
        model: any model; parts that can't be fused are exported as they are.
        path: path of the file, ending in ``.onnx``; its folder must exist.
        x: an example: a tensor, a tuple of positional inputs, a dict of keyword inputs, or a list that is one input.
        dynamic_batch: whether the first axis is free, in each tensor of x that is as long along it as the first tensor.
        dynamic_size: whether the axes from the third on are free. Each is free in the tensors of x that are as long along it as the
            first tensor.
        dynamic_axes: names of the free axes, in place of the two arguments above: ``{"x": {0: "batch", 2: "height"}}``. An input has
            the name that the model's forward gives it. Axes that share a name always have the same size.
        dtype: dtype of the weights, inputs and outputs of the file, ``torch.float16`` or ``torch.float32``. The model is then fused
            in float64, and each weight is rounded once. None keeps the model's own dtype.
        opset: version of ONNX's operators, 13 or newer; None takes torch's default.
        tolerance: allowed ``max |a - b| / max |a|`` for each output a of the fused model. 1e-4 leaves room for another
            order of summation in float32. Where it is not enough, the bound is four times the distance of torch's own output from
            the output in float64, up to a hundred times the tolerance. A model in float16 is allowed at least 1e-1, as in
            `check_equivalent`. With ``dtype=torch.float16``, the file is compared with the same model in float32, and so is torch
            when it rounds each operation to float16, as a GPU does. Both are allowed at least 2e-2.
        labels: names of the classes, which the file's metadata then hold. With labels or a preprocessing, the file's one input is named
            ``images`` and its one output ``logits``.
        preprocessing: how a raw image becomes an input, for the metadata.
        inside: whether the file prepares images itself. Its input is then `(batch, height, width, channels)` in uint8, of any height
            and width. Needs `preprocessing`.
        probabilities: whether the file ends with a softmax over the classes. Its output is then named ``probabilities``.
        about: further keys and texts for the metadata, such as ``{"source": "timm:repvgg_a0", "license": "mit"}``.

    Raises:
        InvalidInput: the path can't be written, or the model can't run on x.
        ExportError: the model can't be exported, onnxruntime can't run the file or computes something else, or a package is
            missing (``pip install 'repfx[onnx]'``).
    """
    require_module(model)
    if not tolerance > 0:
        raise InvalidInput(f"tolerance is {tolerance}: it must be a number above 0.")
    if inside and preprocessing is None:
        raise InvalidInput("the file can prepare images inside only if it is told how: give preprocessing, too.")
    metadata = Metadata(tuple(labels), preprocessing, inside, {**origin_of(model), **(about or {})})
    with random_state_kept(model), staged(path, ".onnx") as (target, staging):
        require_packages()
        _check_opset(opset)
        prepared = Prepared.of(model, x, batch=dynamic_batch, size=dynamic_size, axes=dynamic_axes, dtype=dtype)
        inputs, outputs = None, _output_names(prepared.outputs, x)
        if _is_classifier(x, prepared.outputs, metadata, needed=inside or probabilities):
            inputs, outputs = [NORMALIZED if inside else IMAGES], [LOGITS]
        write_program(
            prepared.model, prepared.example, staging, free=prepared.free, opset=opset, inputs=inputs, outputs=outputs
        )
        found = prepared.compare(partial(_run, staging, prepared.model))
        bound = prepared.bound(tolerance, found)
        if not found.error <= bound:
            blamed = _blame(staging, prepared, bound)
            raise ExportError(f"onnxruntime gives something else than torch: {mismatch(found, bound)}{blamed}.")
        half = prepared.reference.rounding_throughout(*prepared.run)
        if half is not None and not half.error <= bound:
            raise ExportError(f"the model's outputs in float16 differ from those in float32: {mismatch(half, bound)}.")
        error = max(each.error for each in (found, half) if each is not None)
        finish(staging, metadata, prepared.reference, bound, probabilities=probabilities)
        report = _report(target, staging, error, bound)
        if opset is not None and report.opset != opset:
            raise ExportError(
                f"torch wrote opset {report.opset} and can't convert it to opset {opset}: leave opset out."
            )
    return report


def _is_classifier(x: Inputs, outputs: Mapping[str, Tensor], metadata: Metadata, *, needed: bool) -> bool:
    """Whether a model is known to take images, and gives one number for each class.

    Raises:
        InvalidInput: it isn't, and that is needed; or there are too few or too many labels.
    """
    if not isinstance(x, Tensor) or [value.ndim for value in outputs.values()] != [2]:
        if needed:
            shapes = ", ".join(str(tuple(value.shape)) for value in outputs.values())
            raise InvalidInput(
                "images can be prepared inside, and probabilities given, for a model that takes one tensor and gives (images, classes); "
                f"for {describe(x)} this one gives {shapes}."
            )
        return False
    count = next(iter(outputs.values())).shape[1]
    if metadata.labels and len(metadata.labels) != count:
        raise InvalidInput(
            f"there are {len(metadata.labels)} labels, and the model gives {count} numbers for an image."
        )
    return needed or bool(metadata.labels) or metadata.preprocessing is not None


def _check_opset(opset: int | None) -> None:
    newest = package("onnx").defs.onnx_opset_version()
    if opset is not None and not (isinstance(opset, int) and LOWEST <= opset <= newest):
        raise InvalidInput(
            f"opset {opset!r} can't be written: it must be one from {LOWEST} to {newest}, the newest of the installed onnx."
        )


def _output_names(outputs: Mapping[str, Tensor], x: Inputs) -> list[str]:
    """Name the outputs: ``output`` for one tensor, ``output_0`` … for a tuple, and its keys for a dict.

    ``output_`` precedes the keys, too, if x is a dict, whose keys may be the same, or if a key is no plain name.
    """
    if list(outputs) == ["output 0"]:
        return ["output"]
    names = ["_".join(re.findall(r"\w+", where.removeprefix("output "))) for where in outputs]
    plain = all(re.match(r"[A-Za-z_]", name) for name in names) and len(set(names)) == len(names)
    return names if plain and not isinstance(x, Mapping) else [f"output_{name}" for name in names]


def _run(path: Path, model: nn.Module, x: Inputs, *, optimized: bool = True) -> list[Tensor]:
    """Return the outputs of onnxruntime for a file.

    Raises:
        ExportError: it can't run the file.
    """
    try:
        session = open_session(path, optimized=optimized)
        feeds = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), tensors_of(x), strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, feeds)]
    except Exception as error:
        dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
        advice = (
            "" if dtypes <= {"float32"} else f"; its weights are {', '.join(sorted(dtypes))}: give dtype=torch.float32"
        )
        raise ExportError(
            f"onnxruntime can't run the exported model on {describe(x)}: {runtime_reason(error)}{advice}."
        ) from error


def _blame(path: Path, prepared: Prepared, bound: float) -> str:
    """Say that onnxruntime's own rewriting makes the difference, if there is none without it."""
    plain = prepared.compare(partial(_run, path, prepared.model, optimized=False))
    if not plain.error <= bound:
        return ""
    return (
        f"; with its graph optimizations off it agrees with torch ({plain.error:.1e}), so one of them is wrong for this graph: "
        "try another version of onnxruntime"
    )


def _report(target: Path, staging: Path, error: float, bound: float) -> ExportReport:
    file = OnnxFile.read(staging)
    size = sum(each.stat().st_size for each in staging.parent.iterdir())
    return ExportReport(target, error, bound, file.opset, file.inputs, file.outputs, size, file.nodes)

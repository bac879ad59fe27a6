"""Quantize an ONNX file to 8 bits: measure ranges on real inputs, turn weights and activations into integers, and report the cost.

The quantization is onnxruntime's static one, in the QDQ format. A pair of nodes around each tensor states the scale and zero point by which
it is rounded, so that every runtime reads the same numbers from the file. Weights are signed 8-bit integers, with one scale for each
output channel. Activations are unsigned 8-bit integers.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repfx.errors import ExportError, InvalidInput, RepfxError, UnknownName, first_line
from repfx.measuring.calibration import Batches
from repfx.onnx.bias_correction import correct_biases
from repfx.onnx.file import OnnxFile, Value, open_session, package, require_packages, runtime_reason
from repfx.onnx.layer_ranges import measure_layers, weighted_layers
from repfx.onnx.metadata import Metadata, write_metadata
from repfx.onnx.program import quiet
from repfx.onnx.quantization_report import Accuracy, QuantizationReport
from repfx.records.target_file import require_room, staged

METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
_AT_ONCE = 32  # images in a batch, if the file leaves that size free
_PER_CHANNEL = 13  # the first opset whose DequantizeLinear has an axis


def quantize_onnx(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    calibrate: Batches,
    *,
    labelled: Iterable[tuple[Tensor, Tensor]] | None = None,
    method: str = "minmax",
    per_channel: bool = True,
    reduce_range: bool = False,
    keep_float: Sequence[str] = (),
    correct: bool = False,
    bound: float = 10.0,
) -> QuantizationReport:
    """Quantize an ONNX file in float32 to 8 bits, run it in onnxruntime, and report layer by layer what that cost.

    The file appears at `target` only after it has run. It replaces an older file in one step.

    Args:
        source: path of a file that takes one input, such as `export_onnx` writes.
        target: path that ends in ``.onnx``; its folder must exist.
        calibrate: some hundred real inputs, prepared as for the model: tensors, or a data loader whose tuples begin with the input.
            Ranges and the layers' losses are measured on them.
        labelled: batches of inputs and classes, on which both files are run as classifiers.
        method: way to choose the range of an activation from the values seen: ``minmax`` (all of them), ``entropy`` (the range that loses
            least information) or ``percentile`` (all but the outermost values).
        per_channel: whether each output channel of a weight gets its own scale.
        reduce_range: whether weights get 7 bits. x86 processors without VNNI add products in 16 bits, which 8-bit weights can overflow.
        keep_float: names of the layers that stay in float32, as the report gives them.
        correct: whether biases take back what rounding adds to the mean of each channel, measured on `calibrate`.
        bound: decibels that a layer's outputs should be above the noise; the report names the first layer below.

    Raises:
        InvalidInput: a path, an option, the data or the file can't be used.
        ExportError: onnxruntime can't quantize the file or can't run the result, or a package is missing
            (``pip install 'repfx[onnx]'``).
    """
    if method not in METHODS:
        raise UnknownName("calibration method", method, METHODS)
    with staged(target, ".onnx") as (final, staging):
        require_packages()
        path, taken = _source(source, per_channel=per_channel)
        excluded = _nodes(path, keep_float)
        inputs = _inputs(taken, calibrate)
        try:
            with quiet():
                _quantize(
                    path,
                    staging,
                    _Reader(taken.name, inputs),
                    method=method,
                    per_channel=per_channel,
                    reduce_range=reduce_range,
                    excluded=excluded,
                )
                corrected = correct_biases(path, staging, inputs) if correct else ()
                write_metadata(staging, Metadata.read(path))
                OnnxFile.read(staging)
                layers = measure_layers(path, staging, inputs)
                kernel_error = _kernel_error(staging, inputs)
                accuracy = None if labelled is None else _accuracy(path, staging, labelled, _batch_size(taken))
        except RepfxError:
            raise
        except Exception as error:
            for folder in (staging.parent, Path(tempfile.gettempdir())):
                require_room(folder, _size(path))  # onnxruntime writes half a file to a full disk and goes on
            raise ExportError(
                f"onnxruntime can't quantize {str(source)!r}, or run what it made: {runtime_reason(error)}."
            ) from error
        return QuantizationReport(
            path=final,
            method=method,
            per_channel=per_channel,
            reduce_range=reduce_range,
            images=sum(map(len, inputs)),
            size_before=_size(path),
            size=_size(staging),
            layers=layers,
            bound=bound,
            kernel_error=kernel_error,
            accuracy=accuracy,
            corrected=corrected,
        )


class _Reader:
    """Reader that gives onnxruntime the calibration inputs a range at a time, so that it needn't hold the values of all of them."""

    def __init__(self, name: str, inputs: Sequence[Tensor]) -> None:
        self._name, self._inputs = name, inputs
        self._waiting = iter(inputs)

    def __len__(self) -> int:
        return len(self._inputs)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._waiting = iter(self._inputs[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._waiting, None)
        return None if batch is None else {self._name: batch.numpy()}


def _source(source: str | os.PathLike[str], *, per_channel: bool) -> tuple[Path, Value]:
    path = Path(source)
    if not path.is_file():
        raise InvalidInput(f"there is no file {str(source)!r} to quantize.")
    try:
        file = OnnxFile.read(path)
    except Exception as error:
        raise InvalidInput(f"{str(source)!r} can't be read as an ONNX file: {first_line(error)}.") from error
    if "QuantizeLinear" in file.nodes or "DequantizeLinear" in file.nodes:
        raise InvalidInput(f"{str(source)!r} is quantized already: give the file in float32.")
    if len(file.inputs) != 1 or file.inputs[0].dtype != "float":
        taken = "; ".join(map(str, file.inputs))
        raise InvalidInput(
            f"{str(source)!r} takes {taken}: only files that take one input in float32 can be quantized."
        )
    if per_channel and file.opset < _PER_CHANNEL:
        raise InvalidInput(
            f"{str(source)!r} is of opset {file.opset}, and scales for each channel need {_PER_CHANNEL}: "
            f"export it with opset={_PER_CHANNEL} or newer, or give per_channel=False."
        )
    if not weighted_layers(package("onnx").load(path)):
        raise InvalidInput(f"{str(source)!r} has no conv or linear layer with constant weights to quantize.")
    return path, file.inputs[0]


def _nodes(path: Path, keep_float: Sequence[str]) -> list[str]:
    """Return the nodes of the layers named in `keep_float`."""
    layers = weighted_layers(package("onnx").load(path))
    for name in keep_float:
        if name not in {layer.name for layer in layers}:
            raise UnknownName("layer", name, [layer.name for layer in layers])
    return [layer.node for layer in layers if layer.name in keep_float]


def _inputs(taken: Value, calibrate: Batches) -> list[Tensor]:
    """Cut the calibration inputs into batches of a size that the file takes."""
    size = _batch_size(taken)
    found: list[Tensor] = []
    for number, batch in enumerate(calibrate):
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise InvalidInput(
                f"batch {number} of calibrate is of type {type(x).__name__}: give tensors or a data loader."
            )
        x = x.detach().to("cpu", torch.float32)
        _check_fit(x, taken, number)
        if not x.isfinite().all():
            raise InvalidInput(f"batch {number} of calibrate holds numbers that are not finite.")
        found += [part for part in x.split(size or _AT_ONCE) if len(part) == (size or len(part))]
    if not found:
        wanted = "" if size is None else f" of {size} inputs, which is what the file takes at once"
        raise InvalidInput(f"calibrate gave no batch{wanted}: ranges are measured on real inputs.")
    return found


def _batch_size(taken: Value) -> int | None:
    """Return the number of inputs that the file takes at once; None if it is free."""
    return taken.shape[0] if taken.shape and isinstance(taken.shape[0], int) else None


def _check_fit(x: Tensor, taken: Value, number: int) -> None:
    fixed = [axis for axis in range(1, len(taken.shape)) if isinstance(taken.shape[axis], int)]
    if x.dim() != len(taken.shape) or any(x.shape[axis] != taken.shape[axis] for axis in fixed):
        raise InvalidInput(f"batch {number} of calibrate is {list(x.shape)}, and the file takes {taken}.")


def _quantize(
    path: Path,
    staging: Path,
    inputs: _Reader,
    *,
    method: str,
    per_channel: bool,
    reduce_range: bool,
    excluded: list[str],
) -> None:
    quantization = package("onnxruntime.quantization")
    quantization.quantize_static(
        path,
        staging,
        inputs,
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=getattr(quantization.CalibrationMethod, METHODS[method]),
        per_channel=per_channel,
        reduce_range=reduce_range,
        nodes_to_exclude=excluded,
        extra_options={"CalibStridedMinMax": 1},  # a batch at a time; otherwise it holds the values of all batches
    )


def _kernel_error(path: Path, inputs: Sequence[Tensor]) -> float:
    as_written, here = open_session(path, optimized=False), open_session(path)
    name = here.get_inputs()[0].name
    signal = noise = 0.0
    for batch in inputs:
        a, b = (torch.from_numpy(each.run(None, {name: batch.numpy()})[0]).double() for each in (as_written, here))
        signal += float(a.square().sum())
        noise += float((a - b).square().sum())
    return math.sqrt(noise / signal) if signal else float(noise > 0)


def _accuracy(path: Path, staging: Path, labelled: Iterable[tuple[Tensor, Tensor]], size: int | None) -> Accuracy:
    sessions = [open_session(path), open_session(staging, optimized=False), open_session(staging)]
    predicted, labels = [], []
    for number, (x, y) in enumerate(labelled):
        try:
            logits = [_run(each, x.to(torch.float32), size) for each in sessions]
        except Exception as error:
            raise InvalidInput(f"batch {number} of labelled doesn't fit the file: {runtime_reason(error)}.") from error
        if logits[0].ndim != 2 or y.shape != logits[0].shape[:1]:
            raise InvalidInput(
                f"batch {number} of labelled has labels {list(y.shape)}, and the file gives {list(logits[0].shape)} for its inputs: "
                "accuracy needs a classifier's outputs, (images, classes), and one label for each image."
            )
        predicted.append(torch.stack([each.argmax(1) for each in logits]))
        labels.append(y)
    if not labels:
        raise InvalidInput("labelled gave no batch.")
    found, truth = torch.cat(predicted, 1), torch.cat(labels)
    right = (found == truth).double().mean(1).tolist()
    flips = (found != found[0]).sum(1).tolist()
    return Accuracy(len(truth), right[0], right[1], flips[1], right[2], flips[2])


def _run(session: Any, x: Tensor, size: int | None) -> Tensor:
    """Return the file's first output for x, computed in batches of `size`. The last batch is filled up."""
    name = session.get_inputs()[0].name
    filled = x if size is None else torch.cat([x, x[-1:].expand(-len(x) % size, *x.shape[1:])])
    parts = [session.run(None, {name: part.numpy()})[0] for part in filled.split(size or len(x))]
    return torch.cat([torch.from_numpy(part) for part in parts])[: len(x)]


def _size(path: Path) -> int:
    """Return the bytes of a file, including weights stored beside it."""
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())

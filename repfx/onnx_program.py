"""From a torch model to an ONNX file, with the exporter's failures in one sentence and its chatter kept back."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repfx.errors import ExportError, first_line
from repfx.precision import Inputs, as_arguments, seeded

SINGLE_FILE_LIMIT = 2_000_000_000  # bytes of weights; protobuf ends at 2 GiB with all else in the file
BATCH = "batch"


def write_program(
    model: nn.Module, x: Inputs, path: Path, *, batched: Sequence[Tensor], opset: int | None, outputs: Sequence[str]
) -> None:
    """Export a model in eval mode to `path`; weights past protobuf's limit go to ``<name>.data`` beside it.

    Args:
        batched: the tensors of x whose first axis is to be free.
        outputs: names for the outputs.

    Raises:
        ExportError: the model can't be exported, or not with a free batch size.
    """
    program = _export(model, x, batched)
    large = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()}) > SINGLE_FILE_LIMIT
    with quiet():
        try:
            converted = torch.onnx.export(
                program, dynamo=True, verbose=False, opset_version=opset, output_names=list(outputs)
            )
            assert converted is not None
            converted.save(path, external_data=large)
        except Exception as error:
            raise ExportError(f"the model can't be exported: {reason(error)}.") from error
    _name_batch_axis(path)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep prints, warnings and logs of the exporter from the user, who gets the one error that matters."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def reason(error: BaseException) -> str:
    """Why an export failed, in one sentence without its full stop."""
    chain = list(_chain(error))
    text = "\n".join(str(link) for link in chain)
    if "data-dependent" in text or "DataDependent" in "".join(type(link).__name__ for link in chain):
        place = re.search(r"Caused by: \((?!.*__torch_function__)(.*?)\)\n", text)
        where = f" ({place[1]})" if place else ""
        return (
            f"what it computes depends on values inside its tensors{where}, which a graph can't follow; "
            "export a part of it that doesn't, such as its backbone"
        )
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", text)
    if missing:
        return f"ONNX has no operator for torch's {missing[1]!r}"
    return re.sub(r"\x1b\[[0-9;]*m", "", first_line(chain[-1]))


def _export(model: nn.Module, x: Inputs, batched: Sequence[Tensor]) -> torch.export.ExportedProgram:
    try:
        return _exported(model, x, batched)
    except Exception as error:
        if not batched:
            raise ExportError(f"the model can't be exported: {reason(error)}.") from error
        cause = error
    try:
        _exported(model, x, ())
    except Exception as error:
        raise ExportError(f"the model can't be exported: {reason(error)}.") from error
    raise ExportError(
        f"the model can't be exported with a free batch size, since it fixes the first axis of its input "
        f"({len(batched[0])} in this example): pass dynamic_batch=False."
    ) from cause


def _exported(model: nn.Module, x: Inputs, batched: Sequence[Tensor]) -> torch.export.ExportedProgram:
    args, kwargs = as_arguments(x)
    shapes = _shapes(kwargs or args, {id(tensor) for tensor in batched}, torch.export.Dim(BATCH))
    with quiet(), torch.no_grad(), seeded(model):
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes if batched else None, strict=False)


def _shapes(value: Any, batched: set[int], batch: Any) -> Any:
    """`value` with each tensor replaced by what torch.export wants to know of its axes."""
    if isinstance(value, Tensor):
        return {0: batch} if id(value) in batched else None
    if isinstance(value, dict):
        return {key: _shapes(child, batched, batch) for key, child in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_shapes(child, batched, batch) for child in value)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _name_batch_axis(path: Path) -> None:
    """Call the free axis ``batch`` in the file, where the exporter calls it by a number."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    axes = [axis for value in values for axis in value.type.tensor_type.shape.dim if axis.dim_param]
    symbols = [axis.dim_param for value in model.graph.input for axis in value.type.tensor_type.shape.dim[:1]]
    for symbol in filter(None, symbols):
        for axis in axes:
            axis.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", BATCH, axis.dim_param)
    onnx.save(model, path)

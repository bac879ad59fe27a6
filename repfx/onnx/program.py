"""A torch model as a program of `torch.export` and as an ONNX file. Failures are told in one sentence, other output is suppressed."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from repfx.errors import ExportError, first_line
from repfx.measuring.in_float64 import Inputs, as_arguments, map_tensors, seeded
from repfx.onnx.free_axes import BATCH, FreeAxes
from repfx.onnx.opset import LOWEST_OF_TORCH, lowered

SINGLE_FILE_LIMIT = 2_000_000_000  # bytes of weights; protobuf allows 2 GiB for the whole file


def write_program(
    model: nn.Module,
    x: Inputs,
    path: Path,
    *,
    free: FreeAxes,
    opset: int | None,
    outputs: Sequence[str] | None,
    inputs: Sequence[str] | None = None,
) -> None:
    """Export a model in eval mode to `path`. Weights beyond protobuf's limit go to ``<name>.data`` beside it.

    Args:
        free: axes of x that the file leaves free.
        opset: version of ONNX's operators; None takes torch's default.
        outputs: names of the outputs; None leaves them to the exporter.
        inputs: names of the inputs; None takes those of the model's forward.

    Raises:
        ExportError: the model can't be exported, or not with these axes free, or not in this opset.
    """
    from onnx_ir.passes import PassError

    program = exported(model, x, free)
    large = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()}) > SINGLE_FILE_LIMIT
    convert = partial(
        torch.onnx.export,
        program,
        dynamo=True,
        verbose=False,
        opset_version=opset and max(opset, LOWEST_OF_TORCH),
        input_names=inputs,
        output_names=None if outputs is None else list(outputs),
    )
    with quiet():
        try:
            try:
                converted: Any = convert()
            except PassError:  # onnxscript's optimizer fails on some graphs that need no optimizing to be right
                converted = convert(optimize=False)
            converted.save(path, external_data=large)
        except Exception as error:
            raise ExportError(f"the model can't be exported: {reason(error)}.") from error
    _finish(path, free, opset)


def exported(model: nn.Module, x: Inputs, free: FreeAxes) -> torch.export.ExportedProgram:
    """Return a model as a program of `torch.export`.

    Raises:
        ExportError: the model can't be exported, or not with these axes free.
    """
    try:
        return _exported_once(model, x, free)
    except Exception as error:
        if not free:
            raise ExportError(f"the model can't be exported: {reason(error)}.") from error
        cause = error
    try:
        _exported_once(model, x, FreeAxes())
    except Exception as error:
        raise ExportError(f"the model can't be exported: {reason(error)}.") from error
    raise ExportError(_fixed(free, x)) from cause


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporter's prints, warnings and logs, so that the user gets only the one error that matters."""
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


def _fixed(free: FreeAxes, x: Inputs) -> str:
    sizes = free.sizes(x)
    if list(sizes) == [BATCH]:
        return (
            "the model can't be exported with a free batch size, since it fixes the first axis of its input "
            f"({sizes[BATCH]} in this example): pass dynamic_batch=False."
        )
    listed = ", ".join(f"{name} ({size} in this example)" for name, size in sizes.items())
    return (
        f"the model can't be exported with free axes {listed}, since it fixes at least one of them: leave fewer free."
    )


def _exported_once(model: nn.Module, x: Inputs, free: FreeAxes) -> torch.export.ExportedProgram:
    x = map_tensors(torch.clone, x)  # copied, because torch.export marks the tensors themselves as free in size
    args, kwargs = as_arguments(x)
    called = _called_by_name(model) if kwargs and isinstance(model, fx.GraphModule) else model
    with quiet(), torch.no_grad(), seeded(model):
        return torch.export.export(called, args, kwargs, dynamic_shapes=free.specification(model, x), strict=False)


def _called_by_name(graph: fx.GraphModule) -> nn.Module:
    """Return a plain module with the code of a graph and all that it holds: torch.export gives a graph its inputs by position alone."""
    plain: nn.Module = type(type(graph).__name__, (nn.Module,), {"forward": type(graph).forward})()
    vars(plain).update(vars(graph))
    return plain


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _finish(path: Path, free: FreeAxes, opset: int | None) -> None:
    import onnx

    model = onnx.load(path, load_external_data=False)
    _name_axes(model.graph, free)
    if opset is not None and opset < LOWEST_OF_TORCH:
        model = lowered(model, opset)
    onnx.save(model, path)


def _name_axes(graph: Any, free: FreeAxes) -> None:
    """Give the free axes in the file the names of `free`; the exporter has numbered them."""
    names: dict[str, str] = {}
    for value, own in zip(graph.input, free.names):
        for axis, name in own.items():
            names.setdefault(value.type.tensor_type.shape.dim[axis].dim_param, name)
    numbered = list(filter(None, names))
    if not numbered:  # other axes may have symbols of their own, where a size depends on numbers
        return
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, numbered))})\b")
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = symbol.sub(lambda found: names[found[1]], size.dim_param)

"""The operators of ONNX that rules read, each in words of torch that mean exactly the same. All others are left as they are.

A reader returns a `Form`, or the reason why it can't read a node, or None where nobody would expect that the node is merged. What ONNX
can say and torch can't (padding by the input's size, output sizes that are given, other values per batch) isn't read.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F

from repfx.blocks.stages import Subsample
from repfx.onnx.fusing.known_values import Array, Shape
from repfx.onnx.fusing.layer_operators import (
    pads_of,
    read_batch_norm,
    read_conv,
    read_conv_transpose,
    read_gemm,
    read_matmul,
    read_matmul_with_bias,
)
from repfx.onnx.fusing.layers import hands_on
from repfx.onnx.fusing.node_form import Form, Operator, Reader

_TO_THE_END = 2**31 - 1  # the least end of a slice that is surely beyond the end of an axis


def read(operator: Operator) -> Form | str | None:
    """Return a node in words of torch, or the reason why it isn't read, or None."""
    reader = READERS.get(operator.node.op_type)
    names = [name for name in operator.node.outputs if name.name]
    if reader is None or (len(names) != 1 and operator.node.op_type not in _SEVERAL_OUTPUTS):
        return None
    return reader(operator)


# ---- arithmetic


def _arithmetic(function: Callable[..., Any]) -> Reader:
    """Return the reader of an operator on two values."""

    def read_two(operator: Operator) -> Form | None:
        if operator.opset < 7 and operator.node.attributes:
            return None  # it broadcasts in a way of its own
        if function is torch.add and (found := read_matmul_with_bias(operator)) is not None:
            return found
        known = [operator.constant(index) for index in (0, 1)]
        count = sum(array is not None for array in known)
        if count == 2 or (count == 0 and function in (torch.mul, torch.div)):
            return None
        if any(array is not None and not _fits(array, operator.shape(1 - index)) for index, array in enumerate(known)):
            return None
        args = (operator.node.inputs[index] if array is None else array for index, array in enumerate(known))
        return Form(function, tuple(args))

    return read_two


def _fits(array: Array, shape: Shape | None) -> bool:
    """Whether a constant is of floating-point numbers, and surely broadcasts to the shape of the other value."""
    if array.dtype.kind in "biu" or shape is None or array.ndim > len(shape):
        return False
    return all(size == 1 or size == known for size, known in zip(reversed(array.shape), reversed(shape)))


def _neg(operator: Operator) -> Form:
    return Form(torch.neg, (operator.x,))


def _sum(operator: Operator) -> Form | None:
    """Read a sum of several values as additions of two."""
    values = operator.node.inputs
    if (
        len(values) < 2
        or operator.opset < 8
        or any(operator.constant(index) is not None for index in range(len(values)))
    ):
        return None
    total: Any = values[0]
    for value in values[1:]:
        total = Form(torch.add, (total, value))
    form: Form = total
    return form


# ---- windows, borders and parts


def _average_pool(operator: Operator) -> Form | None:
    window = operator.ints("kernel_shape", ())
    ones = (1,) * len(window)
    stride, dilation = operator.ints("strides", ones), operator.ints("dilations", ones)
    pads = pads_of(operator, window, stride, dilation)
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}.get(len(window))
    if pool is None or isinstance(pads, str) or operator.get("ceil_mode", 0) or dilation != ones:
        return None
    if any(map(any, pads)) and not operator.get("count_include_pad", 0):
        return None  # the window shrinks at the border
    if any(before != after for before, after in pads):
        return None
    return Form(pool, (operator.x, window, stride, tuple(before for before, _ in pads)))


def _global_average_pool(operator: Operator) -> Form | None:
    pool: Any = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}.get(operator.axes() or 0)
    return None if pool is None else Form(pool, (operator.x, 1))


def _reduce_mean(operator: Operator) -> Form | None:
    axes = operator.constant(1) if operator.has(1) else operator.get("axes")
    if axes is None or len(axes) == 0:
        return None
    dims, keeps = tuple(int(axis) for axis in axes), bool(operator.get("keepdims", 1))
    shape = operator.shape()
    if shape is not None:  # onnx infers no shape where the axes are computed
        gone = {axis % len(shape) for axis in dims}
        sizes = (1 if axis in gone else size for axis, size in enumerate(shape) if keeps or axis not in gone)
        operator.shapes.note(operator.node.outputs[0], tuple(sizes))
    return Form(torch.mean, (operator.x, dims, keeps))


def _pad(operator: Operator) -> Form | None:
    """Read a padding with one number along the axes behind the channels."""
    axes = operator.axes()
    given = operator.constant(1) if operator.opset >= 11 else operator.get("pads")
    mode = operator.get("mode", "constant")
    if axes is None or axes < 3 or given is None or mode != "constant" or operator.opset < 2:
        return None
    value = operator.get("value", 0.0)
    if operator.has(2):
        number = operator.constant(2)
        if number is None or number.size != 1:
            return None
        value = float(number.reshape(-1)[0])
    along = range(axes)
    if operator.has(3):
        chosen = operator.constant(3)
        if chosen is None:
            return None
        along = [int(axis) % axes for axis in chosen]  # type: ignore[assignment]
    pairs = [(0, 0)] * axes
    for place, axis in enumerate(along):
        pairs[axis] = int(given[place]), int(given[place + len(along)])
    if any(map(any, pairs[:2])):
        return None
    sides = tuple(side for pair in reversed(pairs[2:]) for side in pair)
    return Form(F.pad, (operator.x, sides)) if value == 0 else Form(F.pad, (operator.x, sides, "constant", value))


def _slice(operator: Operator) -> Form | None:
    """Read a slice that crops as an index, and one that keeps every s-th position behind the channels as a subsampling."""
    axes = operator.axes()
    if operator.opset < 10 or axes is None:
        return None
    starts, ends, along, steps = (operator.constant(index) for index in range(1, 5))
    if starts is None or ends is None or (operator.has(3) and along is None) or (operator.has(4) and steps is None):
        return None
    index = [slice(None)] * axes
    stride = [1] * axes
    for place, (start, end) in enumerate(zip(starts.tolist(), ends.tolist())):
        axis = place if along is None else int(along[place]) % axes
        index[axis] = slice(start or None, None if end >= _TO_THE_END else end)
        stride[axis] = 1 if steps is None else int(steps[place])
    if set(stride) == {1}:
        return Form(getitem, (operator.x, tuple(index)))
    if any(each != slice(None) for each in index) or stride[:2] != [1, 1] or min(stride) < 1:
        return None
    return Form(Subsample(tuple(stride[2:])), (operator.x,))


def _concat(operator: Operator) -> Form | None:
    axis = operator.get("axis", 1 if operator.opset < 4 else None)
    if axis is None:
        return None
    return Form(torch.cat, (tuple(operator.node.inputs), axis))


# ---- what hands its input on, and what only moves it


def _identity(operator: Operator) -> Form:
    return Form(hands_on("Identity"), (operator.x,))


def _dropout(operator: Operator) -> Form | None:
    training = operator.constant(2)
    trains = operator.has(2) and (training is None or bool(training.reshape(-1)[0]))
    mask = [output for output in operator.node.outputs[1:] if output.uses() or output.is_graph_output()]
    if trains or mask or operator.opset < 7:
        return None
    return Form(hands_on("Dropout"), (operator.x,))


def _transpose(operator: Operator) -> Form | None:
    order = operator.get("perm")
    return None if order is None else Form(torch.permute, (operator.x, tuple(order)))


def _flatten(operator: Operator) -> Form | None:
    axes = operator.axes()
    if operator.get("axis", 1) != 1 or axes is None or axes < 2:
        return None
    return Form(torch.flatten, (operator.x, 1))


def _depth_to_space(operator: Operator) -> Form | None:
    if operator.get("mode", "DCR") != "CRD":
        return None
    return Form(F.pixel_shuffle, (operator.x, operator.get("blocksize")))


def _shape(operator: Operator) -> Form:
    """Read a question for the shape, which a merged conv answers alike."""
    return Form("size", (operator.x,))


READERS: dict[str, Reader] = {
    "Add": _arithmetic(torch.add),
    "AveragePool": _average_pool,
    "BatchNormalization": read_batch_norm,
    "Concat": _concat,
    "Conv": read_conv,
    "ConvTranspose": read_conv_transpose,
    "DepthToSpace": _depth_to_space,
    "Div": _arithmetic(torch.div),
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gemm": read_gemm,
    "GlobalAveragePool": _global_average_pool,
    "Identity": _identity,
    "MatMul": read_matmul,
    "Mul": _arithmetic(torch.mul),
    "Neg": _neg,
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Shape": _shape,
    "Slice": _slice,
    "Sub": _arithmetic(torch.sub),
    "Sum": _sum,
    "Transpose": _transpose,
}
_SEVERAL_OUTPUTS = ("BatchNormalization", "Dropout")

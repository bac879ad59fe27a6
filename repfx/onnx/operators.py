"""The operators of ONNX that rules read, each in words of torch that mean exactly the same. All others are left as they are.

A reader returns a `Form`, or the reason why it can't read a node, or None where nobody would expect that the node is merged. What ONNX
can say and torch can't (padding by the input's size, output sizes that are given, other values per batch) isn't read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import getitem
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from repfx.algebra.kernel import Ints, Padding
from repfx.blocks.stages import Subsample
from repfx.onnx.folded_values import Array, FoldedValues, Node, Value
from repfx.onnx.layers import CONV_DIMENSIONS, batch_norm, conv, hands_on, linear, tensor_of, transposed_conv
from repfx.onnx.shapes import Shape, Shapes


_EPSILON = torch.tensor(1e-5, dtype=torch.float32, device="cpu").item()  # ONNX holds the default of an attribute in float32
_TO_THE_END = 2**31 - 1  # the least end of a slice that is surely beyond the end of an axis


@dataclass(frozen=True)
class Form:
    """A node in words of torch: a layer, a function or the name of a method, and its arguments.

    Args:
        args: values of the file, arrays, other forms and plain numbers, in any nesting of tuples.
        covers: further nodes that the form stands for.
    """

    target: nn.Module | Callable[..., Any] | str
    args: tuple[Any, ...]
    covers: tuple[Node, ...] = ()


LATER = Form("later", ())  # a node that the form of a later one covers


@dataclass(frozen=True)
class Operator:
    """A node, and what is known of its inputs."""

    node: Node
    opset: int
    constants: FoldedValues
    shapes: Shapes

    @property
    def x(self) -> Value:
        return self.node.inputs[0]

    def has(self, index: int) -> bool:
        """Whether a node has an input at a place."""
        return len(self.node.inputs) > index and self.node.inputs[index] is not None

    def constant(self, index: int) -> Array | None:
        """Return an input as an array, or None if there is none or if it isn't constant."""
        return self.constants.of(self.node.inputs[index]) if self.has(index) else None

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or its default."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def ints(self, name: str, default: Ints) -> Ints:
        """Return an attribute of several numbers."""
        return tuple(self.get(name, default))

    def shape(self, index: int = 0) -> Shape | None:
        return self.shapes.of(self.node.inputs[index]) if self.has(index) else None

    def axes(self, index: int = 0) -> int | None:
        shape = self.shape(index)
        return None if shape is None else len(shape)

    def why_not_constant(self, index: int, name: str) -> str:
        """Return the reason why an input can't be merged with others."""
        if self.constants.is_default(self.node.inputs[index]):
            return f"its {name} is also an input of the file, which a caller may replace: remove it from the inputs"
        return f"its {name} isn't constant"


Reader: TypeAlias = Callable[[Operator], "Form | str | None"]


def read(operator: Operator) -> Form | str | None:
    """Return a node in words of torch, or the reason why it isn't read, or None."""
    reader = READERS.get(operator.node.op_type)
    names = [name for name in operator.node.outputs if name.name]
    if reader is None or len(names) != 1 and operator.node.op_type not in _SEVERAL_OUTPUTS:
        return None
    return reader(operator)


# ---- convs and linear layers


def _pads(operator: Operator, window: Ints, stride: Ints, dilation: Ints) -> Padding | str:
    """Return the padding of a node with a window, (before, after) per axis, or the reason why it isn't fixed."""
    mode, count = operator.get("auto_pad", "NOTSET"), len(window)
    if mode == "VALID":
        return ((0, 0),) * count
    if mode == "NOTSET":
        pads = operator.ints("pads", (0,) * 2 * count)
        return tuple(zip(pads[:count], pads[count:])) if min(pads, default=0) >= 0 else "it crops its input"
    shape = operator.shape()
    sizes = (None,) * count if shape is None else shape[2:]
    pads = []
    for size, k, s, d in zip(sizes, window, stride, dilation):
        if s > 1 and size is None:
            return f"auto_pad={mode} pads by the input's size, which the file doesn't fix"
        total = d * (k - 1) if s == 1 else max((-(-(size or 0) // s) - 1) * s + d * (k - 1) + 1 - (size or 0), 0)
        small, large = total // 2, total - total // 2
        pads.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return tuple(pads)


def _weight_and_bias(operator: Operator, channels_axis: int, groups: int) -> tuple[Array, Array | None] | str:
    weight, bias = operator.constant(1), operator.constant(2)
    if weight is None:
        return operator.why_not_constant(1, "weight")
    if operator.has(2) and bias is None:
        return operator.why_not_constant(2, "bias")
    if weight.ndim - 2 not in CONV_DIMENSIONS:
        return f"its window has {weight.ndim - 2} axes"
    out_channels = weight.shape[channels_axis] * groups
    if bias is not None and bias.shape != (out_channels,):
        return "its bias doesn't fit its weight"
    return weight, bias


def _conv(operator: Operator) -> Form | str:
    found = _weight_and_bias(operator, 0, 1)
    if isinstance(found, str):
        return found
    weight, bias = found
    window = weight.shape[2:]
    ones = (1,) * len(window)
    stride, dilation = operator.ints("strides", ones), operator.ints("dilations", ones)
    pads = _pads(operator, window, stride, dilation)
    if isinstance(pads, str):
        return pads
    if operator.ints("kernel_shape", window) != window:
        return "its kernel_shape isn't that of its weight"
    layer = conv(
        tensor_of(weight),
        None if bias is None else tensor_of(bias),
        stride=stride,
        pads=pads,
        dilation=dilation,
        groups=operator.get("group", 1),
    )
    operator.shapes.note(operator.node.outputs[0], (None, weight.shape[0], *(None,) * len(window)))
    return Form(layer, (operator.x,))


def _conv_transpose(operator: Operator) -> Form | str:
    groups = operator.get("group", 1)
    found = _weight_and_bias(operator, 1, groups)
    if isinstance(found, str):
        return found
    weight, bias = found
    window = weight.shape[2:]
    ones = (1,) * len(window)
    pads = operator.ints("pads", (0,) * 2 * len(window))
    padding = pads[: len(window)]
    if operator.get("output_shape") is not None or operator.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "it pads by the size of its output"
    if padding != pads[len(window) :] or min(pads, default=0) < 0:
        return "it cuts its two sides differently"
    if operator.ints("kernel_shape", window) != window:
        return "its kernel_shape isn't that of its weight"
    layer = transposed_conv(
        tensor_of(weight),
        None if bias is None else tensor_of(bias),
        stride=operator.ints("strides", ones),
        padding=padding,
        output_padding=operator.ints("output_padding", (0,) * len(window)),
        dilation=operator.ints("dilations", ones),
        groups=groups,
    )
    operator.shapes.note(operator.node.outputs[0], (None, weight.shape[1] * groups, *(None,) * len(window)))
    return Form(layer, (operator.x,))


def _gemm(operator: Operator) -> Form | str:
    weight, bias = operator.constant(1), operator.constant(2)
    if weight is None:
        return operator.why_not_constant(1, "weight")
    if operator.has(2) and bias is None:
        return operator.why_not_constant(2, "bias")
    if operator.get("transA", 0) or operator.get("alpha", 1.0) != 1 or operator.get("beta", 1.0) != 1:
        return "it scales or transposes its input"
    rows = weight if operator.get("transB", 0) else weight.T
    if bias is not None:
        if bias.ndim > 2 or (bias.ndim == 2 and bias.shape[0] != 1) or bias.shape[-1:] not in ((), (1,), rows.shape[:1]):
            return "its bias isn't one number for each output"
        if operator.opset < 7:
            return f"the Gemm of opset {operator.opset} has other rules for its bias"
        bias = bias.reshape(-1)[[0] * len(rows)] if bias.size == 1 else bias.reshape(-1)
    layer = linear("Gemm", tensor_of(rows), None if bias is None else tensor_of(bias), 2)
    return Form(layer, (operator.x,))


def _matmul(operator: Operator) -> Form | None:
    weight, axes = operator.constant(1), operator.axes()
    if weight is None or weight.ndim != 2 or axes is None or axes < 2 or weight.dtype.kind in "iu":
        return None
    if _bias_behind(operator) is not None:
        return LATER
    return Form(linear("MatMul", tensor_of(weight.T), None, axes), (operator.x,))


def _bias_behind(matmul: Operator) -> tuple[Node, Array] | None:
    """Return the Add that is all that reads a MatMul, if it adds one number to each output, and these numbers."""
    output = matmul.node.outputs[0]
    uses, weight = list(output.uses()), matmul.constant(1)
    if len(uses) != 1 or output.is_graph_output() or weight is None or matmul.opset < 7:
        return None
    add, place = uses[0].node, uses[0].idx
    if add.op_type != "Add" or add.graph is not matmul.node.graph or len(add.inputs) != 2:
        return None
    bias = matmul.constants.of(add.inputs[1 - place])
    if bias is None or bias.size != weight.shape[1] or bias.shape[-1:] != weight.shape[1:] or bias.ndim > 2:
        return None
    return add, bias.reshape(-1)


def _matmul_with_bias(operator: Operator) -> Form | None:
    """Read an Add behind a MatMul, together with that MatMul, as one layer."""
    for value in operator.node.inputs:
        matmul = None if value is None else value.producer()
        if matmul is None or matmul.op_type != "MatMul" or matmul.graph is not operator.node.graph:
            continue
        inner = Operator(matmul, operator.opset, operator.constants, operator.shapes)
        found = _bias_behind(inner) if _matmul(inner) is LATER else None
        if found is not None:
            weight = inner.constant(1)
            assert weight is not None  # else it wouldn't wait for its bias
            layer = linear("MatMul", tensor_of(weight.T), tensor_of(found[1]), inner.axes() or 2)
            return Form(layer, (inner.x,), (matmul,))
    return None


# ---- scales and shifts


def _batch_norm(operator: Operator) -> Form | str:
    arrays = [operator.constant(index) for index in range(1, 5)]
    outputs = [output for output in operator.node.outputs if output.name]
    if operator.get("training_mode", 0) or len(outputs) > 1 or (operator.opset < 7 and not operator.get("is_test", 0)):
        return "it normalises by the batch: export the model in eval mode"
    if operator.get("spatial", 1) != 1:
        return "it has other statistics at each position"
    names = ("scale", "shift", "mean", "variance")
    for index, (name, array) in enumerate(zip(names, arrays), 1):
        if array is None:
            return operator.why_not_constant(index, name)
    axes = operator.axes()
    if axes is not None and not 2 <= axes <= 5:
        return f"its input has {axes} axes"
    return Form(
        batch_norm(*(tensor_of(array) for array in arrays), operator.get("epsilon", _EPSILON), axes), (operator.x,)
    )


def _arithmetic(function: Callable[..., Any]) -> Reader:
    """Return the reader of an operator on two values."""

    def read_two(operator: Operator) -> Form | None:
        if operator.opset < 7 and operator.node.attributes:
            return None  # it broadcasts in a way of its own
        if function is torch.add and (found := _matmul_with_bias(operator)) is not None:
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
    if len(values) < 2 or operator.opset < 8 or any(operator.constant(index) is not None for index in range(len(values))):
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
    pads = _pads(operator, window, stride, dilation)
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
    return Form(torch.mean, (operator.x, tuple(int(axis) for axis in axes), bool(operator.get("keepdims", 1))))


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
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "Div": _arithmetic(torch.div),
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "Identity": _identity,
    "MatMul": _matmul,
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

"""The operators of ONNX that have weights, read as layers: convs, linear layers and BatchNormalizations."""

from __future__ import annotations

import torch

from repfx.algebra.kernel import Ints, Padding
from repfx.onnx.fusing.known_values import Array, Node
from repfx.onnx.fusing.layers import CONV_DIMENSIONS, batch_norm, conv, linear, tensor_of, transposed_conv
from repfx.onnx.fusing.node_form import LATER, Form, Operator

_EPSILON = torch.tensor(
    1e-5, dtype=torch.float32, device="cpu"
).item()  # ONNX holds the default of an attribute in float32


def pads_of(operator: Operator, window: Ints, stride: Ints, dilation: Ints) -> Padding | str:
    """Return the padding of a node with a window, (before, after) per axis, or the reason why it isn't fixed."""
    mode, count = operator.get("auto_pad", "NOTSET"), len(window)
    if mode == "VALID":
        return ((0, 0),) * count
    if mode == "NOTSET":
        sides = operator.ints("pads", (0,) * 2 * count)
        return tuple(zip(sides[:count], sides[count:])) if min(sides, default=0) >= 0 else "it crops its input"
    shape = operator.shape()
    sizes = (None,) * count if shape is None else shape[2:]
    pads: list[tuple[int, int]] = []
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
    return weight, bias if bias is None or bias.any() else None  # exporters write zeros where there is no bias


def read_conv(operator: Operator) -> Form | str:
    """Read a Conv, with its padding as (before, after) per axis."""
    found = _weight_and_bias(operator, 0, 1)
    if isinstance(found, str):
        return found
    weight, bias = found
    window = weight.shape[2:]
    ones = (1,) * len(window)
    stride, dilation = operator.ints("strides", ones), operator.ints("dilations", ones)
    pads = pads_of(operator, window, stride, dilation)
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


def read_conv_transpose(operator: Operator) -> Form | str:
    """Read a ConvTranspose that cuts both sides of its output alike."""
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


def read_gemm(operator: Operator) -> Form | str:
    """Read a Gemm with a constant weight as a linear layer."""
    weight, bias = operator.constant(1), operator.constant(2)
    if weight is None:
        return operator.why_not_constant(1, "weight")
    if operator.has(2) and bias is None:
        return operator.why_not_constant(2, "bias")
    if operator.get("transA", 0) or operator.get("alpha", 1.0) != 1 or operator.get("beta", 1.0) != 1:
        return "it scales or transposes its input"
    rows = weight if operator.get("transB", 0) else weight.T
    if bias is not None:
        if (
            bias.ndim > 2
            or (bias.ndim == 2 and bias.shape[0] != 1)
            or bias.shape[-1:] not in ((), (1,), rows.shape[:1])
        ):
            return "its bias isn't one number for each output"
        if operator.opset < 7:
            return f"the Gemm of opset {operator.opset} has other rules for its bias"
        bias = bias.reshape(-1)[[0] * len(rows)] if bias.size == 1 else bias.reshape(-1)
    layer = linear("Gemm", tensor_of(rows), None if bias is None else tensor_of(bias), 2)
    return Form(layer, (operator.x,))


def read_matmul(operator: Operator) -> Form | None:
    """Read a MatMul with a constant matrix as a linear layer; `LATER` if a bias is added behind it."""
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


def read_matmul_with_bias(operator: Operator) -> Form | None:
    """Read an Add behind a MatMul, together with that MatMul, as one layer."""
    for value in operator.node.inputs:
        matmul = None if value is None else value.producer()
        if matmul is None or matmul.op_type != "MatMul" or matmul.graph is not operator.node.graph:
            continue
        inner = Operator(matmul, operator.opset, operator.constants, operator.shapes)
        found = _bias_behind(inner) if read_matmul(inner) is LATER else None
        if found is not None:
            weight = inner.constant(1)
            assert weight is not None  # else it wouldn't wait for its bias
            layer = linear("MatMul", tensor_of(weight.T), tensor_of(found[1]), inner.axes() or 2)
            return Form(layer, (inner.x,), (matmul,))
    return None


# ---- BatchNormalization


def read_batch_norm(operator: Operator) -> Form | str:
    """Read a BatchNormalization in eval mode."""
    outputs = [output for output in operator.node.outputs if output.name]
    if operator.get("training_mode", 0) or len(outputs) > 1 or (operator.opset < 7 and not operator.get("is_test", 0)):
        return "it normalises by the batch: export the model in eval mode"
    if operator.get("spatial", 1) != 1:
        return "it has other statistics at each position"
    names = ("scale", "shift", "mean", "variance")
    arrays: list[Array] = []
    for index, name in enumerate(names, 1):
        array = operator.constant(index)
        if array is None:
            return operator.why_not_constant(index, name)
        arrays.append(array)
    axes = operator.axes()
    if axes is not None and not 2 <= axes <= 5:
        return f"its input has {axes} axes"
    scale, shift, mean, variance = map(tensor_of, arrays)
    epsilon = operator.get("epsilon", _EPSILON)
    return Form(batch_norm(scale, shift, mean, variance, epsilon, axes), (operator.x,))

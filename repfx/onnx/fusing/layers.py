"""Layers that stand for the nodes of an ONNX file while rules run on it. Their classes are named like the operators. Nobody calls them."""

from __future__ import annotations

import warnings
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from repfx.algebra.baking import CONV_OF
from repfx.algebra.kernel import Ints, Kernel, Padding
from repfx.algebra.layers import TRANSPOSED_CONVS, Layer
from repfx.algebra.meaning import Meaning, reads

Numbers: TypeAlias = "Tensor | None"


def _named(operator: str, base: type[nn.Module]) -> Any:
    """Return a subclass of a torch layer that is named like an operator."""
    return type(operator, (base,), {"inplace": False, "__module__": __name__, "__doc__": f"ONNX's {operator}."})


_CONVS = {dimensions: _named("Conv", base) for dimensions, base in CONV_OF.items()}
_TRANSPOSED_CONVS = {dimensions: _named("ConvTranspose", base) for dimensions, base in enumerate(TRANSPOSED_CONVS, 1)}
_LINEAR = {operator: _named(operator, nn.Linear) for operator in ("Gemm", "MatMul")}
_BATCH_NORMS = {
    axes: _named("BatchNormalization", base)
    for axes, base in {
        2: nn.BatchNorm1d,
        3: nn.BatchNorm1d,
        4: nn.BatchNorm2d,
        5: nn.BatchNorm3d,
        None: nn.SyncBatchNorm,
    }.items()
}
_HANDS_ON = {operator: _named(operator, nn.Identity) for operator in ("Identity", "Dropout")}

CONV_DIMENSIONS = tuple(_CONVS)


@reads(*_CONVS.values())
def _read_conv(conv: Layer) -> Meaning:
    """Read a conv that may pad its two sides differently, as ONNX's conv can and torch's can't."""

    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        bias = None if conv.bias is None else conv.bias.to(like)
        return Kernel(conv.weight.to(like), bias, conv.stride, conv.pads, conv.dilation, conv.groups)

    return Meaning("conv", len(conv.kernel_size), conv.in_channels, build)


def conv(weight: Tensor, bias: Numbers, *, stride: Ints, pads: Padding, dilation: Ints, groups: int) -> nn.Module:
    """Return the layer of a Conv with weights ``(out, in / groups, *window)``."""
    channels, window = (weight.shape[1] * groups, weight.shape[0]), tuple(weight.shape[2:])
    kind = _CONVS[len(window)]
    layer = kind(
        *channels,
        window,
        stride,
        dilation=dilation,
        groups=groups,
        bias=bias is not None,
        device="meta",
        dtype=weight.dtype,
    )
    layer.pads = pads
    return _with(layer, weight, bias)


def transposed_conv(
    weight: Tensor, bias: Numbers, *, stride: Ints, padding: Ints, output_padding: Ints, dilation: Ints, groups: int
) -> nn.Module:
    """Return the layer of a ConvTranspose with weights ``(in, out / groups, *window)``."""
    channels, window = (weight.shape[0], weight.shape[1] * groups), tuple(weight.shape[2:])
    kind = _TRANSPOSED_CONVS[len(window)]
    sizes = (stride, padding, output_padding, groups, bias is not None, dilation)
    return _with(kind(*channels, window, *sizes, device="meta", dtype=weight.dtype), weight, bias)


def linear(operator: str, weight: Tensor, bias: Numbers, axes: int) -> nn.Module:
    """Return the layer of a Gemm or a MatMul with weights ``(out, in)``, whose input has so many axes."""
    sizes = (weight.shape[1], weight.shape[0], bias is not None)
    layer = _LINEAR[operator](*sizes, device="meta", dtype=weight.dtype)
    layer.axes = axes
    return _with(layer, weight, bias)


def batch_norm(
    scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, epsilon: float, axes: int | None
) -> nn.Module:
    """Return the layer of a BatchNormalization in eval mode whose input has so many axes; None if that isn't known."""
    layer: Layer = _BATCH_NORMS[axes](len(mean), epsilon, device="meta", dtype=scale.dtype)
    layer.axes = axes
    layer.running_mean, layer.running_var = mean, variance
    return _with(layer, scale, shift).eval()


def hands_on(operator: str) -> nn.Module:
    """Return the layer of a node that hands its input on."""
    layer: nn.Module = _HANDS_ON[operator]()
    return layer


def _with(layer: Layer, weight: Tensor, bias: Numbers) -> nn.Module:
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    found: nn.Module = layer
    return found


def tensor_of(array: Any) -> Tensor:
    """Return an array of a file as a tensor in the same memory, which may be that of the file. So nothing may write into it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the memory can't be written
        if array.dtype.name == "bfloat16":  # numpy doesn't have it by itself
            return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
        return torch.from_numpy(array)

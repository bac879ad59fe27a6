"""Layers of torch with the tensors of a program, as calls of operators mean them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.algebra.baking import CONV_OF
from repfx.exported.operators import ConvCall, NormCall

NORM_OF = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def norm_layer(cls: Any, call: NormCall, mean: Tensor, var: Tensor, weight: Any, bias: Any) -> nn.Module:
    """Return the BatchNorm of a class that a call means."""
    layer: Any = cls(mean.numel(), eps=call.eps, affine=False, device="meta")
    layer.running_mean, layer.running_var = mean, var
    layer.weight, layer.bias = _parameter(weight), _parameter(bias)
    layer.num_batches_tracked = torch.zeros((), dtype=torch.long)
    return layer  # type: ignore[no-any-return]


def conv_layer(call: ConvCall, weight: Tensor, bias: Tensor | None) -> nn.Module | None:
    """Return the conv or linear layer that a call means, or None if its sizes are computed in the graph or it has other axes."""
    if call.dimensions == 0:
        if weight.ndim != 2 or (bias is not None and bias.ndim != 1):
            return None
        layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    else:
        layer = _plain_conv(call, weight, has_bias=bias is not None)
        if layer is None:
            return None
    layer.weight, layer.bias = _parameter(weight), _parameter(bias)
    return layer  # type: ignore[no-any-return]


def _plain_conv(call: ConvCall, weight: Tensor, *, has_bias: bool) -> nn.Module | None:
    dimensions = weight.ndim - 2
    if dimensions not in CONV_OF or call.dimensions not in (None, dimensions) or not isinstance(call.groups, int):
        return None
    named = isinstance(call.padding, str)
    sizes = [sizes_of(size, dimensions) for size in (call.stride, call.dilation, call.output_padding)]
    padding = call.padding if named else sizes_of(call.padding, dimensions)
    if any(size is None for size in (*sizes, padding)):
        return None
    stride, dilation, output_padding = sizes
    others: dict[str, Any] = {"bias": has_bias, "groups": call.groups, "device": "meta", "padding": padding}
    others |= {"stride": stride, "dilation": dilation, "kernel_size": tuple(weight.shape[2:])}
    if call.transposed:
        cls = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dimensions]
        return cls(weight.shape[0], weight.shape[1] * call.groups, **others, output_padding=output_padding)
    return CONV_OF[dimensions](weight.shape[1] * call.groups, weight.shape[0], **others)


def sizes_of(size: Any, dimensions: int) -> Any:
    """Return one number for each axis, or None if a size is computed in the graph."""
    sizes = [size] if isinstance(size, (int, fx.Node)) else list(size)
    sizes = sizes * dimensions if len(sizes) == 1 else sizes
    return tuple(sizes) if all(isinstance(each, int) for each in sizes) else None


def _parameter(tensor: Any) -> Any:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)

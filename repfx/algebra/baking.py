"""Kernels back to plain modules: float64 arithmetic, rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Ints, Kernel, is_symmetric
from repfx.algebra.layers import Layer
from repfx.errors import InvalidInput


def float64_like(weight: Tensor) -> Tensor:
    """Return a scalar with the dtype and device in which kernels are computed: float64, on the weight's device if that has float64."""
    return torch.empty((), dtype=torch.float64, device="cpu" if weight.device.type == "mps" else weight.device)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in another dtype, rounded once. torch itself takes float64 to float16 through float32 and so rounds twice.

    The step to float32 rounds to odd. At a tie, this tells the second rounding on which side the number was (Boldo and Melquiond, 2008).

    >>> rounded(torch.tensor(1 + 2**-11 + 2**-30, dtype=torch.float64), torch.float16).item()
    1.0009765625
    """
    if x.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return x.to(dtype)
    near = x.float()
    other = torch.nextafter(near, torch.where(x > near, torch.inf, -torch.inf).float())
    keep = (near.double() == x) | (near.view(torch.int32) % 2 == 1)
    return torch.where(keep, near, other).to(dtype)


def conv_from_kernel(kernel: Kernel, template: Layer, path: str) -> nn.Module:
    """Return a plain conv or linear layer with this kernel, rounded once to the dtype of `template`, on its device.

    Raises:
        InvalidInput: the weight or the bias isn't finite.
    """
    conv = _empty_conv(kernel, template)
    for name in ("weight", "bias"):
        value = getattr(kernel, name)
        if value is None:
            continue
        tensor = rounded(value.detach(), template.weight.dtype).to(template.weight.device)
        if tensor.device.type != "meta" and not _is_finite(tensor):
            raise InvalidInput(
                f"the merged {name} of {path!r} is not finite in {tensor.dtype}; look for NaN or Inf in the model."
            )
        # Copied, because `contiguous` keeps odd strides of axes of size one. From these torch takes a 1×1 conv's output for channels last.
        laid_out = torch.empty_like(tensor, memory_format=_memory_format(tensor, template.weight)).copy_(tensor)
        setattr(conv, name, nn.Parameter(laid_out, requires_grad=template.weight.requires_grad))
    return conv


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite. NaN is the largest and the smallest of its tensor."""
    if not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack((tensor.max(), tensor.min()))).all())


def _memory_format(tensor: Tensor, like: Tensor) -> torch.memory_format:
    """Return channels last if `like`, the weight of the template, is laid out so; else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    as_is = (
        last is None or like.ndim != tensor.ndim or like.is_contiguous() or not like.is_contiguous(memory_format=last)
    )
    return torch.contiguous_format if as_is or last is None else last


def _empty_conv(kernel: Kernel, template: Layer) -> nn.Module:
    like = torch.empty((), device="meta", dtype=template.weight.dtype)
    bias = kernel.bias is not None
    spec = ConvSpec.of_kernel(kernel)
    if (
        not spec.is_linear
        and not spec.transposed
        and isinstance(template.padding, str)
        and _same_places(spec, ConvSpec.of(template))
    ):
        return _conv(spec, template.padding, like, bias=bias)  # padding="same" stays as the user wrote it
    return conv_module(spec, like, bias=bias, padded=is_symmetric(kernel.padding))


def _same_places(a: ConvSpec, b: ConvSpec) -> bool:
    return (a.kernel_size, a.padding, a.dilation) == (b.kernel_size, b.padding, b.dilation)


CONV_OF: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED_CONV_OF: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def conv_module(spec: ConvSpec, like: Tensor, *, bias: bool, padded: bool = True) -> nn.Module:
    """Return torch's conv or linear layer of these sizes.

    The padding of `spec` has to be symmetric, unless `padded=False` leaves it out.
    """
    return _conv(spec, tuple(before if padded else 0 for before, _ in spec.padding), like, bias=bias)


def _conv(spec: ConvSpec, padding: str | Ints, like: Tensor, *, bias: bool) -> nn.Module:
    if spec.is_linear:
        shape = {"in_features": spec.in_channels, "out_features": spec.out_channels, "bias": bias}
        return _made(nn.Linear, {**shape, "device": like.device, "dtype": like.dtype})
    sizes: dict[str, Any] = {
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "kernel_size": spec.kernel_size,
        "stride": spec.stride,
        "padding": padding,
        "dilation": spec.dilation,
        "groups": spec.groups,
        "bias": bias,
        "device": like.device,
        "dtype": like.dtype,
    }
    if spec.transposed:
        return _made(_TRANSPOSED_CONV_OF[spec.dimensions], {**sizes, "output_padding": spec.output_padding})
    return _made(CONV_OF[spec.dimensions], {**sizes, "padding_mode": spec.padding_mode})


def _made(cls: Any, sizes: Mapping[str, Any]) -> nn.Module:
    """Return a layer. On the meta device it has no numbers that would have to be drawn, and drawing takes long there."""
    on_meta = sizes["device"].type == "meta"
    layer: nn.Module = (_undrawn(cls) if on_meta else cls)(**sizes)
    layer.__class__ = cls
    return layer


@cache
def _undrawn(cls: Any) -> Any:
    return type(cls.__name__, (cls,), {"reset_parameters": lambda self: None})

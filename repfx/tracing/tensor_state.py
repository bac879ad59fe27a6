"""A note of a module's tensors by which it can be told whether code has written to one, or has put another one in its place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def tensor_state(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return for each tensor of a module, by name: its identity, how often it was written to, and for a parameter the sum of its bits.

    The sum shows writes into ``.data``, which torch doesn't count. It is 0 for other tensors.
    """
    weights = dict(module.named_parameters())
    tensors: dict[str, Tensor] = {**weights, **dict(module.named_buffers())}
    for path, inner in module.named_modules():
        tensors.update({f"{path}.{name}": value for name, value in vars(inner).items() if isinstance(value, Tensor)})
    return {
        name: (id(tensor), _version_of(tensor), _sum_of_bits(tensor) if name in weights else 0)
        for name, tensor in tensors.items()
        if "_tensor_constant" not in name and not is_lazy(tensor)
    }


def _version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for an inference tensor, for which torch doesn't count."""
    return 0 if tensor.is_inference() else tensor._version


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sum_of_bits(weight: Tensor) -> int:
    """Sum the bits of a parameter, read as integers; other values nearly always give another sum. 0 if there are none to read."""
    if weight.is_meta or weight.layout is not torch.strided:
        return 0
    real = torch.view_as_real(weight.detach()) if weight.is_complex() else weight.detach()
    size, flat = real.element_size(), real.contiguous().reshape(-1)
    # adding eight bytes at once is several times quicker
    in_eights = flat.numel() * size % 8 == flat.storage_offset() * size % 8 == 0
    return int(flat.view(torch.int64 if in_eights else _INTEGERS[size]).sum(dtype=torch.int64))

"""Tell whether a model computes the same with channels last, the memory format in which convs are faster on CPUs and GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from repfx.algebra.torch_faults import may_corrupt_memory
from repfx.data.predictions import logits_of
from repfx.measuring.difference import differences, worst
from repfx.measuring.in_float64 import double_copy, run_double, seeded
from repfx.records.notes import copy_of

_FORMATS = (torch.contiguous_format, torch.channels_last)
_ROUNDING = 1e-9  # allowed difference in float64
_CPU = torch.device("cpu")


def runs_with_channels_last(model: nn.Module, images: Tensor, device: torch.device = _CPU) -> bool:
    """Tell whether a model gives the same output in eval mode with channels last, and can be trained for a step so.

    Copies of the model are tried, with kernels and images laid out so. Only a trial can tell, because code may ask how a tensor lies in
    memory, or rely on it, in many ways: `view`, `as_strided`, a write into what `reshape` returned. Outputs are compared on the CPU,
    because convs in float64 forget the order on a GPU. The step of training runs on `device`. On a CPU it ends before the backward pass
    if the model runs a conv for which torch may corrupt memory there; the result is then False. It is False, too, for a model that can't
    be copied or doesn't run on the CPU, and for one without kernels over two axes.

    Args:
        images: two or more images, `(batch, channels, height, width)`.
        device: device on which the model will be trained.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> runs_with_channels_last(net, torch.randn(2, 3, 6, 7))
    True
    """
    if images.ndim != 4 or not any(weight.ndim == 4 for weight in model.parameters()):
        return False
    images = images.cpu()
    try:
        tried = copy_of(model).cpu()
        found = [
            run_double(double_copy(tried).to(memory_format=order), images.contiguous(memory_format=order))
            for order in _FORMATS
        ]
        return worst(differences(*found)).error <= _ROUNDING and _trains(tried.to(device), images.to(device), device)
    except Exception:  # the model's own code may raise anything
        return False


def _trains(model: nn.Module, images: Tensor, device: torch.device) -> bool:
    """Tell whether a model runs forward and backward with channels last. It goes backward only where this is safe."""
    model = model.to(memory_format=torch.channels_last).train()
    watch = _Watch()
    with seeded(model), torch.enable_grad(), device:
        with watch:
            total = logits_of(model(images.contiguous(memory_format=torch.channels_last))).sum()
        if device.type == "cpu" and watch.saw_fault:
            return False
        total.backward()
    return True


class _Watch(TorchDispatchMode):
    """A watch over every conv that runs, in a layer or by a function. It notes whether torch may corrupt memory for one of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.saw_fault = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.convolution.default:
            self.saw_fault |= _may_corrupt_memory(*args)
        return function(*args, **(kwargs or {}))


def _may_corrupt_memory(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> bool:
    """Whether torch may corrupt memory for a call of its conv. A transposed conv takes the kernels of the conv back from its output."""
    in_channels = weight.shape[1] * groups
    return may_corrupt_memory(in_channels, weight.shape[2:], stride, padding)

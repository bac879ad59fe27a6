"""Tell whether a model computes the same with channels last, the memory format in which convs are faster on CPUs and GPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repfx.data.predictions import logits_of
from repfx.measuring.difference import differences, worst
from repfx.measuring.in_float64 import double_copy, run_double, seeded
from repfx.records.notes import copy_of

_FORMATS = (torch.contiguous_format, torch.channels_last)
_ROUNDING = 1e-9  # allowed difference in float64


def runs_with_channels_last(model: nn.Module, images: Tensor) -> bool:
    """Tell whether a model gives the same output in eval mode with channels last, and can be trained for a step so.

    Copies of the model are tried, with kernels and images laid out so. Only a trial can tell, because code may ask how a tensor lies in
    memory, or rely on it, in many ways: `view`, `as_strided`, a write into what `reshape` returned. The trial runs on the CPU, because
    convs in float64 forget the order on a GPU. The result is False, too, for a model that can't be copied or doesn't run on the CPU, and
    for one without kernels over two axes.

    Args:
        images: two or more images, `(batch, channels, height, width)`.

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
        trained = tried.to(memory_format=torch.channels_last).train()
        with seeded(trained), torch.enable_grad(), torch.device("cpu"):
            logits_of(trained(images.contiguous(memory_format=torch.channels_last))).sum().backward()
        return worst(differences(*found)).error <= _ROUNDING
    except Exception:  # the model's own code may raise anything
        return False

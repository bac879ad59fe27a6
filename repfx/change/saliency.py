"""Saliency: what a conv's weights and their gradient say about how much it would be worth to grow it, one number a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Metric = Callable[[Tensor, Tensor], Tensor]


def _synflow(weight: Tensor, gradient: Tensor) -> Tensor:
    """Σ g·W, with its sign (DyRep's own choice).

    Of a conv in front of a BatchNorm in training mode this is zero but for ε, for the scale of its weights makes no difference.
    """
    return (gradient * weight).sum()


def _snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """Σ |g·W|."""
    return (gradient * weight).abs().sum()


def _gradient_norm(weight: Tensor, gradient: Tensor) -> Tensor:
    """‖g‖, the root of the sum of squares."""
    norm: Tensor = torch.linalg.vector_norm(gradient)
    return norm


def _random(weight: Tensor, gradient: Tensor) -> Tensor:
    """A number from [0, 1), whatever the conv: what every other metric has to beat."""
    return torch.rand((), device=gradient.device, dtype=gradient.dtype)


METRICS: dict[str, Metric] = {
    "synflow": _synflow,
    "snip": _snip,
    "gradient_norm": _gradient_norm,
    "random": _random,
}

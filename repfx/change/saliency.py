"""Saliency: one number for a conv and a step, from its weights and their gradient, that says how much growing the conv is worth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Metric = Callable[[Tensor, Tensor], Tensor]


def _synflow(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return Σ g·W, with its sign (DyRep's own choice).

    For a conv in front of a BatchNorm in training mode this is zero but for ε, because the scale of its weights makes no difference.
    """
    return (gradient * weight).sum()


def _snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return Σ |g·W|."""
    return (gradient * weight).abs().sum()


def _gradient_norm(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return ‖g‖, the root of the sum of squares."""
    norm: Tensor = torch.linalg.vector_norm(gradient)
    return norm


def _random(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return a random number in [0, 1) for any conv: the control that every other metric has to beat."""
    return torch.rand((), device=gradient.device, dtype=gradient.dtype)


METRICS: dict[str, Metric] = {
    "synflow": _synflow,
    "snip": _snip,
    "gradient_norm": _gradient_norm,
    "random": _random,
}

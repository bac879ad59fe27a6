"""Random BatchNorms, and asserts in float64, for authors of branch kinds and passes.

A fresh BatchNorm hides every mistake (its statistics are 0 and 1), and float32 hides a forgotten eps. So tests randomise every BatchNorm
and compare in float64, with a tolerance of 1e-9.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from repfx.algebra.layers import Layer, is_batch_norm

TOLERANCE = 1e-9


@torch.no_grad()
def randomize_batch_norm(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm random statistics, γ of both signs and random β, in place; return the model.

    >>> norm = randomize_batch_norm(nn.BatchNorm2d(3))
    >>> bool((norm.weight == 1).any())
    False
    """
    generator = torch.Generator().manual_seed(seed)
    norms: list[Layer] = [module for module in model.modules() if is_batch_norm(module)]
    for norm in norms:
        for tensor, low, high in _ranges(norm):
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
            tensor.copy_(values * (high - low) + low)
        if norm.weight is not None:
            flipped = torch.rand(norm.weight.shape, generator=generator, device="cpu") < 0.3
            norm.weight.copy_(torch.where(flipped.to(norm.weight.device), -norm.weight, norm.weight))
    return model


def _ranges(norm: Layer) -> list[tuple[Tensor, float, float]]:
    known = [
        (norm.running_mean, -0.5, 0.5),
        (norm.running_var, 0.5, 2.0),
        (norm.weight, 0.5, 1.5),
        (norm.bias, -0.5, 0.5),
    ]
    return [(tensor, low, high) for tensor, low, high in known if tensor is not None]


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Return max |output - reference| / max |reference|; the absolute error if the reference is all 0; inf for other shapes or NaN."""
    if output.shape != reference.shape:
        return float("inf")
    if output.numel() == 0:
        return 0.0
    worst = float((output - reference).detach().abs().max())
    scale = float(reference.detach().abs().max()) or 1.0
    return worst / scale if worst == worst else float("inf")


@torch.no_grad()
def assert_same_map(
    map_: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], x: Tensor, tolerance: float = TOLERANCE
) -> None:
    """Assert that two maps give the same output for `x`. Both run as they are, in their own mode and dtype."""
    output, expected = map_(x), reference(x)
    error = relative_error(output, expected)
    assert error <= tolerance, f"relative error {error:.1e}, shapes {tuple(output.shape)} and {tuple(expected.shape)}"


def assert_equivalent(model: nn.Module, reference: nn.Module, x: Tensor, tolerance: float = TOLERANCE) -> None:
    """Assert that two models compute the same in eval mode, in float64, on copies."""
    twins = [copy.deepcopy(module).double().eval() for module in (model, reference)]
    assert_same_map(twins[0], twins[1], x.double(), tolerance)

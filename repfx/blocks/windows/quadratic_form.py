"""`quadratic_form`: k Σ kᵀ of many kernels k, with one product for the value and the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repfx.algebra.arithmetic import is_transformed

Times = Callable[[Tensor], Tensor]


def quadratic_form(weight: Tensor, times: Times, whole: Tensor) -> Tensor:
    """Return ``k Σ kᵀ``, ``(groups, out)``, of kernels ``(groups, out, …)``; differentiable in them any number of times.

    The gradient is ``2 k Σ``, and ``k Σ`` is known from the value. So a step takes one product instead of two.

    Args:
        weight: the kernels.
        times: returns ``k Σ`` of kernels.
        whole: the tensor that Σ is made of. The second derivative multiplies by Σ once more, so Σ must be the same then.

    >>> weight, covariance = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> quadratic_form(weight, lambda k: k @ covariance, covariance)
    tensor([[18.]])
    """
    recorded = is_transformed() or torch._C._get_tracing_state() is not None
    if weight.requires_grad and torch.is_grad_enabled() and not recorded:
        with torch.no_grad():
            product = times(weight)
        found: Tensor = _Form.apply(weight, product, times, whole)
        return found
    return (weight * times(weight)).flatten(2).sum(2)


def _version_of(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class _Form(torch.autograd.Function):
    """``Σ k · p`` for p = ``k Σ`` that is known: its gradient is 2 p, so nothing is multiplied for it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, product: Tensor, times: Times, whole: Tensor) -> Tensor:
        ctx.times, ctx.whole, ctx.version = times, whole, _version_of(whole)
        ctx.save_for_backward(weight, product)
        return (weight * product).flatten(2).sum(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, product = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            if _version_of(ctx.whole) != ctx.version:
                raise RuntimeError("the covariance was measured anew, so this gradient can't be differentiated again")
            product = ctx.times(weight)
        scale: Tensor = gradient.reshape(*gradient.shape, *(1,) * (weight.ndim - 2))
        return 2 * scale * product, None, None, None

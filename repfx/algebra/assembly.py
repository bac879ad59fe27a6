"""`assembled`: the kernel that replaces several modules in one forward pass, made from their parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from repfx.algebra.kernel import Kernel


def assembled(kernel_like: Callable[[Tensor], Kernel], weight: Tensor) -> Kernel:
    """Return the kernel that `kernel_like` makes in the precision and on the device of `weight`, under any autocast; differentiable.

    The gradient of its weight is made contiguous once, for all products behind it. The gradient that comes from a conv in channels last
    has the taps of a kernel in its middle axes, but the products' own gradients have them last.
    """
    # autocast doesn't know the meta device
    exact: AbstractContextManager[Any] = nullcontext()
    if not weight.is_meta:
        exact = torch.autocast(weight.device.type, enabled=False)
    with exact:
        kernel = kernel_like(weight)
        compiling, tracing = torch.compiler.is_compiling(), torch._C._get_tracing_state() is not None
        if compiling or tracing:  # a compiler lays gradients out by itself, and a trace has none
            return kernel
        return replace(kernel, weight=_OrderedGradient.apply(kernel.weight))


class _OrderedGradient(torch.autograd.Function):
    """The identity, whose gradient comes back contiguous.

    The gradient of a kernel in channels last has the batch of these products in its innermost axis. torch would then multiply matrix by
    matrix.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)

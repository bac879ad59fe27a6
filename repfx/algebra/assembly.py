"""`assembled`: the kernel that replaces several modules in one forward pass, made from their parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from repfx.algebra.arithmetic import is_transformed
from repfx.algebra.kernel import Kernel

# what returns the kernel that waits for an owner, or None, while a model runs whose kernels are assembled together
WAITING: ContextVar[Callable[[object], Kernel | None] | None] = ContextVar("repfx_waiting", default=None)


def assembled(kernel_like: Callable[[Any], Kernel], weight: Tensor, owner: object | None = None) -> Kernel:
    """Return the kernel that `kernel_like` makes in the precision and on the device of `weight`, under any autocast; differentiable.

    It is the kernel that waits for the owner, if there is one. Else the gradient of its weight is made contiguous once, for all products
    behind it. The gradient that comes from a conv in channels last has the taps of a kernel in its middle axes, but the products' own
    gradients have them last.

    Args:
        owner: the block or region that the kernel is for, or None for something that never waits.
    """
    compiling, tracing = torch.compiler.is_compiling(), torch._C._get_tracing_state() is not None
    if not (owner is None or compiling or tracing or is_transformed()):
        take = WAITING.get()
        kernel = None if take is None else take(owner)
        if kernel is not None:
            return kernel
    with in_full(weight):
        kernel = kernel_like(weight)
        if compiling or tracing:  # a compiler lays gradients out by itself, and a trace has none
            return kernel
        return replace(kernel, weight=_OrderedGradient.apply(kernel.weight))


def in_full(weight: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on the device of a weight. Autocast doesn't know the meta device."""
    return nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False)


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

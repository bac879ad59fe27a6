"""Sums and products of weights: in place where that equals the ordinary operation, and none at all on the meta device.

Rules ask for the sizes of a kernel far more often than for its numbers. On the meta device, where tensors have sizes alone, even one
operation takes long, and the first of a process imports torch's compiler. So there an operand of the right size serves as the result, or
an empty tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def plus(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of two tensors of one shape."""
    return a if a.is_meta and b.is_meta else a + b


def plus_in_place(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of two tensors of one shape, written over `a` if `add_in_place` can do so."""
    return plus(a, b) if a.is_meta else add_in_place(a, b)


def times(weight: Tensor, scale: Tensor | float) -> Tensor:
    """Return the product of a weight and a scale, a number or a tensor that broadcasts to its shape."""
    return weight if weight.is_meta else weight * scale


def full(like: Tensor, shape: Sequence[int], value: float) -> Tensor:
    """Return a tensor that has one value everywhere, in the dtype and on the device of `like`."""
    return like.new_empty(shape) if like.is_meta else like.new_full(shape, value)


def add_in_place(total: Tensor, term: Tensor) -> Tensor:
    """Return the sum of two tensors of one shape, written over `total` if `has_room` allows it.

    >>> total = torch.ones(2)
    >>> add_in_place(total, torch.ones(2)) is total, add_in_place(total, torch.ones(2).double()) is total
    (True, False)
    """
    return total.add_(term) if has_room(total, term) else total + term


def has_room(total: Tensor, term: Tensor) -> bool:
    """Whether `total` can hold its sum with `term`, of the same shape: their dtypes are equal, and nothing records or transforms the code.

    Under `vmap` the sum may have more elements. A recorded graph would write over its constants. A compiler decides by itself what to
    write over.
    """
    return isinstance(total, Tensor) and total.dtype == term.dtype and not is_transformed()


def is_transformed() -> bool:
    """Whether `torch.compile`, a transform of `torch.func` or a recorder of all operations, such as `make_fx`, is at work.

    >>> torch.func.vmap(lambda x: x + is_transformed())(torch.zeros(2)), is_transformed()
    (tensor([1., 1.]), False)
    """
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None or get_proxy_mode() is not None

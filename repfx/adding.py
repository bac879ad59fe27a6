"""Addition in place, where that is the same as addition."""

from __future__ import annotations

import torch
from torch import Tensor


def add_in_place(total: Tensor, term: Tensor) -> Tensor:
    """The sum of two tensors of one shape, written over `total` where it has room for that.

    >>> total = torch.ones(2)
    >>> add_in_place(total, torch.ones(2)) is total, add_in_place(total, torch.ones(2).double()) is total
    (True, False)
    """
    return total.add_(term) if has_room(total, term) else total + term


def has_room(total: Tensor, term: Tensor) -> bool:
    """Whether a tensor has all digits and, under `vmap`, all elements that its sum with another one of its shape has.

    Not where code is compiled, which decides by itself what to write over.
    """
    return total.dtype == term.dtype and not torch.compiler.is_compiling() and torch.func.debug_unwrap(term) is term

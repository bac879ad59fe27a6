"""The axis of the batch, where a constant gave it to an input without one."""

from __future__ import annotations

from typing import Any

from torch import fx


def with_axes(x: Any, axes: int) -> Any:
    """Return x with so many axes at least; new ones come first and have size 1, as in arithmetic with a constant of so many axes.

    >>> import torch
    >>> with_axes(torch.ones(3, 4), 3).shape, with_axes(torch.ones(2, 3, 4), 3).shape
    (torch.Size([1, 3, 4]), torch.Size([2, 3, 4]))
    """
    if isinstance(x, fx.Proxy):  # a graph that calls this is traced again
        return x.tracer.create_proxy("call_function", with_axes, (x, axes), {})
    return x.reshape((1,) * (axes - x.ndim) + tuple(x.shape)) if x.ndim < axes else x

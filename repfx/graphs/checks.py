"""Steps that a graph takes when it runs: checks of inputs, because code was traced for one kind of them, and the axis of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx

from repfx.errors import InvalidInput


def _recorded(check: Callable[..., None]) -> Callable[..., None]:
    """Let a check become a node of the graph if it runs while that graph is traced, as it does when a graph is unpickled."""

    @wraps(check)
    def checked(value: Any, *args: Any) -> None:
        if issubclass(type(value), fx.Proxy):
            value.tracer.create_proxy("call_function", checked, (value, *args), {})
        else:
            check(value, *args)

    return checked


@_recorded
def require_tensor(value: object) -> None:
    """Raise InvalidInput unless `value` is a tensor. Traced code has asked whether it is one, and tracing answered yes."""
    if not isinstance(value, Tensor):
        raise InvalidInput(
            f"this module was traced with a tensor and is called with a {type(value).__name__} instead: pass a tensor."
        )


@_recorded
def require_default(value: object, name: str, default: object) -> None:
    """Raise InvalidInput for a value other than the one that the graph was traced with."""
    tensors = isinstance(value, Tensor) or isinstance(default, Tensor)
    if value is not default and (tensors or value != default):
        raise InvalidInput(f"this module was traced with {name}={default!r} and can't be called with another value.")


@_recorded
def require_given(value: object, name: str, default: object) -> None:
    """Raise InvalidInput if an argument is left out that was an input when the graph was traced, unless its default is a number."""
    is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
    if value is default and not is_number:
        raise InvalidInput(f"this module was traced with {name!r} as an input and can't be called without it.")


@_recorded
def require_nothing(value: object, name: str) -> None:
    """Raise InvalidInput for further arguments, taken by ``*args`` or ``**kwargs``, when the graph was traced without any."""
    if value:
        raise InvalidInput(f"this module was traced without {name!r} and can't be called with further arguments.")


@_recorded
def require_parts(value: Any, count: int) -> None:
    """Raise InvalidInput for another number of parts than the code that was traced counted on: `chunk` may give fewer than asked for."""
    if len(value) != count:
        raise InvalidInput(f"this module was traced with {count} chunks, and its input has {len(value)}.")


@_recorded
def require_answer(value: Any, answer: bool, code: str) -> None:
    """Raise InvalidInput where the code that was traced raises an error. Sizes that an export leaves free aren't checked."""
    if not isinstance(value, torch.SymBool) and bool(value) != answer:
        raise InvalidInput(
            f"the input doesn't pass a check in the code of the model from which this module was traced: {code!r}."
        )


def with_axes(x: Any, axes: int) -> Any:
    """Return x with so many axes at least; new ones come first and have size 1, as in arithmetic with a constant of so many axes.

    >>> import torch
    >>> with_axes(torch.ones(3, 4), 3).shape, with_axes(torch.ones(2, 3, 4), 3).shape
    (torch.Size([1, 3, 4]), torch.Size([2, 3, 4]))
    """
    if isinstance(x, fx.Proxy):  # a graph that calls this is traced again
        return x.tracer.create_proxy("call_function", with_axes, (x, axes), {})
    return x.reshape((1,) * (axes - x.ndim) + tuple(x.shape)) if x.ndim < axes else x

"""Runs of copies of any model wholly in float64, so that what two models compute can be told from how they round it."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from repfx.errors import InvalidInput
from repfx.records.generators import random_state_kept
from repfx.records.notes import copy_of

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]

_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_CASTS: set[object] = {Tensor.float, Tensor.half, Tensor.bfloat16}


def double_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode that shares nothing with the model. Every floating tensor of it is float64.

    Raises:
        InvalidInput: the model can't be copied, or has parameters without values.
    """
    memo: dict[int, Any] = {}
    for path, module in model.named_modules():
        for name, tensor in _own_tensors(module):
            if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
                raise InvalidInput(f"{f'{path}.{name}'.lstrip('.')!r} has no values yet: run or load the model first.")
            memo[id(tensor)] = _double(tensor)
    copied: nn.Module = copy_of(model, memo)
    copied.eval()
    return copied


def run_double(model: nn.Module, x: Inputs) -> Any:
    """Return the outputs of a `double_copy` on x in float64 and on the model's device, without gradients and from one seed.

    Tensors that the model creates on its way, or casts to a narrower type, are float64 too. Afterwards the state of the
    random number generators and the default dtype are as before.
    """
    args, kwargs = as_arguments(widened(x, device_of(model)))
    # A GraphModule's own call prints its code to stderr when its forward raises.
    call: Callable[..., Any] = nn.Module.__call__ if isinstance(model, fx.GraphModule) else type(model).__call__
    with torch.no_grad(), seeded(model), default_dtype(torch.float64), _DoublePrecision():
        return call(model, *args, **kwargs)


def as_arguments(x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments that x means.

    Raises:
        InvalidInput: x is not a tensor, a tuple, a list or a dict with string keys.

    >>> as_arguments((1, 2)), as_arguments([1, 2]), as_arguments({"mask": 3})
    (((1, 2), {}), (([1, 2],), {}), ((), {'mask': 3}))
    """
    if isinstance(x, Tensor):
        return (x,), {}
    if isinstance(x, tuple):
        return x, {}
    if isinstance(x, list):
        return (x,), {}
    if isinstance(x, Mapping) and all(isinstance(key, str) for key in x):
        return (), dict(x)
    raise InvalidInput(
        f"x is of type {type(x).__name__}: give a tensor, a tuple of positional inputs, a dict of keyword inputs or a list "
        "that is one input (a dict or tuple that is one input goes inside a tuple)."
    )


def by_name(model: nn.Module, x: Inputs) -> dict[str, Any]:
    """Return what x gives a model, by the names that its forward gives the arguments; nothing if x doesn't fit the forward.

    >>> by_name(nn.Conv2d(1, 1, 1), (3,))
    {'input': 3}
    """
    args, kwargs = as_arguments(x)
    try:
        return inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError:
        return {}


def describe(x: object) -> str:
    """Describe the types and shapes of an input in a few words.

    >>> describe((torch.zeros(2, 3), 1))
    '(float32 [2, 3], 1)'
    """
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(value)}" for key, value in x.items()) + "}"
    if isinstance(x, list):
        return "[" + ", ".join(map(describe, x)) + "]"
    if isinstance(x, tuple):
        return "(" + ", ".join(map(describe, x)) + ")"
    return repr(x) if isinstance(x, (int, float, str, bool, type(None))) else type(x).__name__


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to all tensors in a nesting of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, child) for key, child in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, child) for child in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, child) for child in value)
    return value


def widened(x: Any, device: torch.device | None) -> Any:
    """Copy the tensors of x, the floating ones to float64, and all of them to `device` if one is given."""
    return map_tensors(lambda tensor: tensor.detach().to(device, _WIDE.get(tensor.dtype, tensor.dtype), copy=True), x)


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device that all tensors of a model are on, or None if there is no such device."""
    devices = {tensor.device for module in model.modules() for _, tensor in _own_tensors(module)}
    return devices.pop() if len(devices) == 1 else None


@contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """Let random numbers inside start from one seed, on each device of the model too. Afterwards the generators go on undisturbed."""
    used = {tensor.device for module in model.modules() for _, tensor in _own_tensors(module)}
    with ExitStack() as stack:
        stack.enter_context(random_state_kept(model))
        random.seed(0)
        torch.default_generator.manual_seed(0)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        for device in used:
            if device.type in ("cpu", "meta"):
                continue
            stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
            with torch.get_device_module(device).device(device):
                torch.get_device_module(device).manual_seed(0)
        yield


class _DoublePrecision(TorchFunctionMode):
    """A mode in which casts to a narrower type, and tensors created in one, become float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function = Tensor.double if func in _CASTS else func
        named = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return function(*(_wide(value) for value in args), **named)


def _wide(value: Any) -> Any:
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make this dtype the default inside, for tensors that are created without one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters, buffers and plain tensors that a module holds itself. `nn.utils.weight_norm` keeps a plain one."""
    for held in (module._parameters, module._buffers, vars(module)):
        for name, value in held.items():
            if isinstance(value, Tensor):
                yield name, value


def _double(tensor: Tensor) -> Tensor:
    wide = tensor.detach().to(_WIDE.get(tensor.dtype, tensor.dtype), copy=True)
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide

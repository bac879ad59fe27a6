"""Proxies: the objects that code sees in place of tensors while it is traced.

A proxy records what code does to a value, and refuses what a graph can't record.
"""

from __future__ import annotations

import linecache
import operator
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx

from repfx.graphs.aliasing import IN_PLACE_OPERATORS
from repfx.graphs.checks import require_tensor
from repfx.graphs.vocabulary import SIZE_METHODS
from repfx.tracing.forms import SIZES
from repfx.tracing.input_checks import is_in_message

_INSTANCE_CHECKS = ("abc", "torch.nn.parameter")  # modules whose Python code answers `isinstance` for some classes

_OWN = frozenset({"__dict__", "tracer", "node", "_node", "root", "attr"})


class ValueProxy(fx.Proxy):
    """A proxy that records in-place changes, answers `isinstance` like a tensor, and refuses what a graph can't record.

    torch.fx's own proxy takes ``x += y`` for ``x = x + y``, which leaves x as it was. It says that it is no tensor. It lets code assign
    attributes, or format its shape as text, as if nothing had happened.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class that the model's Python code sees: Tensor, or the known type of a size. Other code sees the proxy's own class.

        If the answer is Tensor, the graph checks at each call that the value is one.
        """
        frame = _asking_frame()
        if is_tracing(frame) or not _asks_for_a_class(frame):
            return type(self)
        known = _known_type(self.node)
        if known is not None:
            return known
        if self._form() is None and not any(user.target is require_tensor for user in self.node.users):
            self.tracer.create_proxy("call_function", require_tensor, (self,), {})
        return Tensor

    def __getattr__(self, name: str) -> Any:
        form = self._form() if name in SIZES else None
        return _Attribute(self, name) if form is None else getattr(form, name)

    def _form(self) -> Tensor | None:
        """The tensor without numbers if it is computed from parameters alone, else None. Its sizes are known."""
        tracer: Any = self.tracer
        form: Tensor | None = tracer.forms.of(self.node)
        return form

    def __len__(self) -> int:
        tracer: Any = self.tracer
        count: int | None = tracer.count_of(self)
        return super().__len__() if count is None else count

    def __float__(self) -> float:
        tracer: Any = self.tracer
        raise tracer.as_number(self, "float()")

    def __int__(self) -> int:
        tracer: Any = self.tracer
        raise tracer.as_number(self, "int()")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN:
            raise TypeError(f"code assigns the attribute {name!r} of a tensor")
        object.__setattr__(self, name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __str__(self) -> str:
        if is_tracing(_asking_frame()):
            return fx.Proxy.__repr__(self)
        raise TypeError("code writes a value that depends on the input into a text")

    def __format__(self, form: str) -> str:
        if is_in_message(sys._getframe(1)):
            return f"<{self.node.name}>"
        raise TypeError("code writes a value that depends on the input into a text")


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in IN_PLACE_OPERATORS:
    setattr(ValueProxy, f"__{_name}__", _in_place(_name))


def _asking_frame() -> FrameType | None:
    """The frame that asked: two frames up, skipping modules such as `abc` that only forward an `isinstance` call."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in _INSTANCE_CHECKS:
        frame = frame.f_back
    return frame


def is_tracing(frame: FrameType | None) -> bool:
    """Whether a frame runs the tracer's code, not the model's."""
    return frame is not None and _module_of(frame).startswith(("torch.fx", "repfx."))


def _asks_for_a_class(frame: FrameType | None) -> bool:
    """Whether Python code asks for a value's class, and not one of torch's functions in C++.

    Such a function must not be told Tensor, because it would take the proxy for a tensor in memory.

    Raises:
        TypeError: a `torch.autograd.Function` asks. A graph of its forward would lose its own backward pass.
    """
    if frame is None:
        return False
    if _module_of(frame).startswith(("torch.autograd.function", "torch._functorch")):
        raise TypeError("it calls a torch.autograd.Function, and a graph would lose its own backward pass")
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    words = line if line else " ".join(frame.f_code.co_names)
    return any(word in words for word in ("isinstance", "__class__", "case ", "is_tensor"))


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _known_type(node: fx.Node) -> type | None:
    """The type of a node that is a shape, size, dtype or device, or is computed from sizes; None for any other node."""
    if node.op == "call_function" and node.target is getattr:
        return {"shape": torch.Size, "ndim": int, "dtype": torch.dtype, "device": torch.device}.get(str(node.args[1]))
    if node.op == "call_method" and node.target in SIZE_METHODS:
        return torch.Size if node.target == "size" and len(node.args) + len(node.kwargs) == 1 else int
    if node.op != "call_function" or getattr(node.target, "__module__", None) != "_operator":
        return None
    types: set[type] = set()
    for source in node.all_input_nodes:
        known = _known_type(source)
        if known not in (int, float, torch.Size):
            return None
        types.add(known)
    if node.target is operator.getitem and types == {torch.Size}:
        return torch.Size if isinstance(node.args[1], slice) else int
    return None if torch.Size in types else (float if node.target is operator.truediv else types.pop())


def is_of_sizes(node: fx.Node) -> bool:
    """Whether a node compares or calculates with shapes, sizes, dtypes and devices alone."""
    if getattr(node.target, "__module__", None) != "_operator" or not node.all_input_nodes:
        return _known_type(node) is not None
    return all(map(is_of_sizes, node.all_input_nodes))


class _Attribute(ValueProxy, fx.proxy.Attribute):
    """The value of ``x.name``, as long as it isn't known whether code calls it."""

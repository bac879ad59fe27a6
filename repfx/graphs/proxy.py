"""Proxies: the objects that code sees in place of tensors while it is traced.

A proxy records what code does to a value, and refuses what a graph can't record.
"""

from __future__ import annotations

import linecache
import operator
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.graphs.aliasing import IN_PLACE_OPERATORS
from repfx.graphs.checks import require_tensor
from repfx.graphs.constants import is_pure
from repfx.graphs.functional_conv import origins_of
from repfx.graphs.vocabulary import SIZE_METHODS

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
        if _is_tracing(frame) or not _asks_for_a_class(frame):
            return type(self)
        known = _known_type(self.node)
        if known is not None:
            return known
        if not any(user.target is require_tensor for user in self.node.users):
            self.tracer.create_proxy("call_function", require_tensor, (self,), {})
        return Tensor

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN:
            raise TypeError(f"code assigns the attribute {name!r} of a tensor")
        object.__setattr__(self, name, value)

    def __len__(self) -> int:
        tracer: Any = self.tracer
        count: int | None = tracer.count_of(self)
        return fx.Proxy.__len__(self) if count is None else count

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __str__(self) -> str:
        if _is_tracing(_asking_frame()):
            return fx.Proxy.__repr__(self)
        raise TypeError("code writes a value that depends on the input into a text")

    def __format__(self, form: str) -> str:
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


def _is_tracing(frame: FrameType | None) -> bool:
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


class _Attribute(ValueProxy, fx.proxy.Attribute):
    """The value of ``x.name``, as long as it isn't known whether code calls it."""


class ParameterProxy(ValueProxy):
    """A parameter or buffer. Its sizes are known, so code gets them as numbers and can iterate over it."""

    def __iter__(self) -> Iterator[Any]:
        whole: Any = self
        return iter([whole[index] for index in range(len(self))])

    def __len__(self) -> int:
        return len(self._tensor())

    @property
    def shape(self) -> torch.Size:
        return self._tensor().shape

    @property
    def ndim(self) -> int:
        return self._tensor().ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self._tensor().numel()

    def _tensor(self) -> Tensor:
        tracer: Any = self.tracer
        path, _, name = str(self.node.target).rpartition(".")
        # read from the dicts below, because the owner's attributes are proxies while tracing runs
        owner: nn.Module = tracer.root.get_submodule(path)
        return {**owner._parameters, **owner._buffers}[name]  # type: ignore[return-value]


# ---- over how many values code iterates

_CHUNKS = {torch.chunk, "chunk"}
_EQUAL_SPLITS = {torch.tensor_split, "tensor_split"}
_SPLITS = {torch.split, "split", torch.split_with_sizes, "split_with_sizes"}


def count_of(node: fx.Node, root: nn.Module) -> int | None:
    """Return over how many values code iterates if it iterates over a node, or None if that isn't known.

    `chunk` may give fewer parts than it was asked for, so a graph has to check that it doesn't (`may_be_fewer`).
    """
    if node.target in _CHUNKS:
        count = _second(node, "chunks")
        return count if isinstance(count, int) and count > 0 else None
    if node.target in _EQUAL_SPLITS:
        count = _second(node, "indices_or_sections", "sections")
        return count if isinstance(count, int) else None
    sizes = _second(node, "split_size_or_sections", "split_size", "split_sizes") if node.target in _SPLITS else None
    value = sizes if isinstance(sizes, (tuple, list)) else _value_of(node, root)
    if isinstance(value, Tensor) and value.ndim == 0:
        return None
    return len(value) if isinstance(value, (Tensor, tuple, list)) else None


def may_be_fewer(node: fx.Node) -> bool:
    """Whether a node may give fewer parts than `count_of` says."""
    return node.target in _CHUNKS


def _second(node: fx.Node, *names: str) -> Any:
    """Return the second argument of a call, which may be given by one of these names."""
    return (
        node.args[1] if len(node.args) > 1 else next((node.kwargs[name] for name in names if name in node.kwargs), None)
    )


def _value_of(node: fx.Node, root: nn.Module) -> Any:
    """Return the value of a node without its numbers, or None if it doesn't depend on parameters alone."""
    origins = origins_of(node)
    if not all(origin.op == "get_attr" or is_pure(origin) for origin in origins):
        return None
    known: dict[fx.Node, Any] = {}
    try:
        with torch.no_grad():
            for origin in sorted(origins):
                known[origin] = _compute(origin, root, known)
    except Exception:  # what needs the numbers has no value here
        return None
    return known[node]


def _compute(node: fx.Node, root: nn.Module, known: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return _parameter(str(node.target), root).detach().to("meta")
    args: Any = fx.node.map_arg(node.args, known.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, known.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _parameter(path: str, root: nn.Module) -> Tensor:
    """Return the parameter or buffer at a path, from the module's tables: its attributes are proxies while code is traced."""
    owner_path, _, name = path.rpartition(".")
    owner = root.get_submodule(owner_path)
    found = {**owner._parameters, **owner._buffers}[name]
    assert found is not None  # None is no node
    return found

"""A tracer for torch.fx that records what the code does: writing in place, arguments with defaults, iterating over a parameter."""

from __future__ import annotations

import enum
import inspect
import itertools
import linecache
import operator
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.block import RepBlock
from repfx.errors import InvalidInput, first_line
from repfx.leaves import is_leaf, stays_whole
from repfx.meaning import has_call_of_its_own
from repfx.memory import IN_PLACE_OPERATORS, require_tensor

# functions of libraries that no trace gets through, with nothing in them to rewrite
_LEAF_FUNCTIONS = {"timm.layers.padding": ("pad_same",)}


class Tracer(fx.Tracer):
    """Leaves are convs, BatchNorms, and all that holds none of them or has hooks; the blocks in `shared`, and the `opaque` classes."""

    proxy_buffer_attributes = True  # else what is computed from a buffer would be a constant, whatever is loaded later

    def __init__(self, shared: Container[nn.Module] = (), opaque: Container[type[nn.Module]] = ()) -> None:
        found = (
            getattr(sys.modules[module], name)
            for module, names in _LEAF_FUNCTIONS.items()
            if module in sys.modules
            for name in names
        )
        super().__init__(autowrap_functions=tuple(found))
        self.shared = shared
        self.opaque = opaque
        self.block_calls: Counter[nn.Module] = Counter()
        self._with_gradients = torch.is_grad_enabled()
        self.running: list[nn.Module] = []  # whose code runs now; after an error, whose code failed
        self.failures: list[tuple[str, nn.Module | None]] = []  # what could not be traced, caught by code or not

    def let_go(self) -> None:
        """Hold on to no module: torch.fx puts a tracer that has run into a cycle, which only Python's garbage collector takes apart."""
        self.root = nn.Module()
        self.submodule_paths = None
        self.tensor_attrs = {}
        self.block_calls.clear()
        self.running.clear()
        self.failures.clear()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """As torch.fx, but that code that switches autocast on or off, wherever that is written, can't be traced."""
        with _without_autocast():
            return super().trace(root, concrete_args)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if has_call_of_its_own(m):  # which has run already when this is reached, and would run again in the graph
            self.running.append(m)
            raise TypeError(f"{type(m).__name__} has a __call__ of its own")
        self.block_calls[m] += isinstance(m, RepBlock)
        self.running.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.running.pop()
        return result

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        """Without annotations that are texts, as ``from __future__ import annotations`` makes them: torch 2.8 can't pickle such a graph.

        A graph knows nothing of gradients that are switched off, so they may not have changed since tracing began.
        """
        if torch.is_grad_enabled() != self._with_gradients:
            raise TypeError("it switches gradients on or off")
        return super().create_node(kind, target, args, kwargs, name, None if isinstance(type_expr, str) else type_expr)

    def create_arg(self, a: Any) -> Any:
        """numpy's numbers, and others of a class of their own, as plain ones, for the graph is written as text."""
        if issubclass(type(a), fx.Proxy):
            return a.node
        if type(a).__module__ == "numpy" and getattr(a, "ndim", 1) == 0:
            return a.item()
        if type(a) not in (bool, int, float) and isinstance(a, (int, float)) and not isinstance(a, enum.Enum):
            return int(a) if isinstance(a, int) else float(a)
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self._noting_failure(super().to_bool, obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        found: Iterator[Any] = self._noting_failure(super().iter, obj)
        return found

    def _noting_failure(self, function: Callable[[fx.Proxy], Any], obj: fx.Proxy) -> Any:
        """Code may catch the error and go on as if it had been its own."""
        try:
            return function(obj)
        except Exception as error:
            self.failures.append((sentence(error), self.running[-1] if self.running else None))
            raise

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ParameterProxy(node, self) if node.op == "get_attr" else _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or stays_whole(m) is not None or m in self.shared or type(m) in self.opaque

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """An argument with a default stands for its default; the graph refuses any other value when it is called."""
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        parameters = list(inspect.signature(root_fn).parameters.values())
        single = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # torch.fx lists them first
        for index, parameter in enumerate(single):
            if index and parameter.default is not inspect.Parameter.empty and isinstance(arguments[index], fx.Proxy):
                self.create_proxy(
                    "call_function", require_default, (arguments[index], parameter.name, parameter.default), {}
                )
                arguments[index] = parameter.default
        _order_placeholders(parameters[1:], self.graph)
        return function, arguments


def _order_placeholders(parameters: list[inspect.Parameter], graph: fx.Graph) -> None:
    """Let the graph's forward take its arguments as the traced one does; torch.fx would put ``*args`` behind those by keyword alone."""
    required = inspect.Parameter.empty
    parameters = sorted(parameters, key=lambda p: (p.kind, p.kind is p.KEYWORD_ONLY and p.default is not required))
    placeholders = {str(node.target).lstrip("*"): node for node in graph.nodes if node.op == "placeholder"}
    nodes = [placeholders[parameter.name] for parameter in parameters]
    for before, node in itertools.pairwise(nodes):
        before.append(node)
    for before, after in itertools.pairwise(parameters):
        if after.kind is after.KEYWORD_ONLY and after.default is required and before.default is not required:
            raise TypeError(f"torch.fx can't take {after.name!r} by keyword alone, after an argument with a default")


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Whoever enters autocast gets a `TypeError`, for a graph knows nothing of it."""

    def refuse(_: Any) -> None:
        raise TypeError("it switches autocast on or off")

    enter = torch.autocast.__enter__
    torch.autocast.__enter__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


_INSTANCE_CHECKS = ("abc", "torch.nn.parameter")  # where `isinstance` of some classes is written in Python
_OWN = frozenset({"__dict__", "tracer", "node", "_node", "root", "attr"})


class _Proxy(fx.Proxy):
    """Records what code does to a value in place, and doesn't let it take a value for something else than it is.

    torch.fx's own proxy takes ``x += y`` for ``x = x + y``, which leaves x as it was; says that it is no tensor; and lets code assign
    attributes, or write its shape into a text, as if nothing had happened.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` looks at: a tensor, of which the graph makes sure where it runs."""
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
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


def _asking_frame() -> FrameType | None:
    """Where the code runs that called the caller of this; of a question that Python code passes on, where it was asked."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in _INSTANCE_CHECKS:
        frame = frame.f_back
    return frame


def _is_tracing(frame: FrameType | None) -> bool:
    """Whether it is the tracer's code that runs there, not the model's."""
    return frame is not None and _module_of(frame).startswith(("torch.fx", "repfx."))


def _asks_for_a_class(frame: FrameType | None) -> bool:
    """Whether Python code asks for a value's class, not one of torch's functions in C++, which would take a proxy for a tensor in memory.

    Raises:
        TypeError: it is a `torch.autograd.Function` that asks, whose own backward pass a graph of its forward would lose.
    """
    if frame is None:
        return False
    if _module_of(frame).startswith(("torch.autograd.function", "torch._functorch")):
        raise TypeError("it calls a torch.autograd.Function, whose own backward pass a graph doesn't have")
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    words = line if line else " ".join(frame.f_code.co_names)
    return any(word in words for word in ("isinstance", "__class__", "case ", "is_tensor"))


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _known_type(node: fx.Node) -> type | None:
    """The type of sizes and what is computed from them; None for all else."""
    if node.op == "call_function" and node.target is getattr:
        return {"shape": torch.Size, "ndim": int, "dtype": torch.dtype, "device": torch.device}.get(str(node.args[1]))
    if node.op == "call_method" and node.target in ("size", "dim", "numel", "ndimension", "nelement"):
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


class _Attribute(_Proxy, fx.proxy.Attribute):
    """``x.name``, of which it isn't known yet whether it is called."""


class _ParameterProxy(_Proxy):
    """A parameter or buffer, of which the sizes are known."""

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
        owner: nn.Module = tracer.root.get_submodule(path)  # whose attributes are proxies while tracing runs
        return {**owner._parameters, **owner._buffers}[name]  # type: ignore[return-value]


def sentence(error: Exception) -> str:
    """What torch.fx says, without its advice. Kept in the error's place, whose frames would hold on to the model."""
    return first_line(error).split(". ")[0]


def require_default(value: object, name: str, default: object) -> None:
    """Refuse a value other than the one that the graph was traced with."""
    tensors = isinstance(value, Tensor) or isinstance(default, Tensor)
    if value is not default and (tensors or value != default):
        raise InvalidInput(f"this module was traced with {name}={default!r} and can't be called with another value.")

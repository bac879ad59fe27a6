"""A tracer for torch.fx that also records writes in place, arguments with defaults, and iteration over a parameter."""

from __future__ import annotations

import enum
import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.algebra.layers import has_call_of_its_own
from repfx.blocks.block import RepBlock
from repfx.errors import InvalidInput, first_line
from repfx.graphs.leaves import is_leaf, stays_whole
from repfx.graphs.proxy import ParameterProxy, ValueProxy
from repfx.graphs.settings import Settings, changed_setting, put_back, settings_in

# functions of other libraries that can't be traced and have nothing inside to rewrite
_LEAF_FUNCTIONS = {"timm.layers.padding": ("pad_same",)}


class Tracer(fx.Tracer):
    """A tracer of one module in one mode.

    Leaves are torch's convs, BatchNorms, and modules that hold neither or that have hooks. So are the blocks in `shared`, and modules of
    the `opaque` classes.
    """

    proxy_buffer_attributes = True  # else a value computed from a buffer would stay as it is when others are loaded

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
        self._settings: Settings = {}
        self.running: list[nn.Module] = []  # modules whose code runs now; after an error, whose code failed
        self.failures: list[tuple[str, nn.Module | None]] = []  # caught by code or not; with the module that failed

    def let_go(self) -> None:
        """Drop all references to modules.

        torch.fx puts a tracer that has run into a reference cycle, which only Python's garbage collector can free.
        """
        self.root = nn.Module()
        self.submodule_paths = None
        self.tensor_attrs = {}
        self._settings = {}
        self.block_calls.clear()
        self.running.clear()
        self.failures.clear()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace like torch.fx, but refuse code that switches autocast on or off, wherever that is written."""
        self._settings = settings_in(root)
        try:
            with _without_autocast():
                graph = super().trace(root, concrete_args)
            for module in self._settings:
                self._require_settings(module)
        finally:
            put_back(self._settings)
        return graph

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if has_call_of_its_own(m):  # its __call__ has already run by now, and would run again in the graph
            self.running.append(m)
            raise TypeError(f"{type(m).__name__} has a __call__ of its own")
        self._require_settings(m)
        self.block_calls[m] += isinstance(m, RepBlock)
        self.running.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.running.pop()
        return result

    def _require_settings(self, module: nn.Module) -> None:
        """Raise `TypeError` if code has changed a setting of a module that it calls. It isn't known which code did that."""
        is_leaf = self.is_leaf_module(module, "")
        for inner in module.modules() if is_leaf else (module,):
            changed = changed_setting(inner, self._settings)
            if changed is not None:
                self.running.clear()
                raise TypeError(f"it changes {changed.strip('_')!r} of a {type(inner).__name__} while it runs")

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        """Make a node, without an annotation that is text, because torch 2.8 can't pickle a graph with one.

        ``from __future__ import annotations`` turns annotations into text.

        Raises:
            TypeError: code has switched gradients on or off since tracing began. A graph can't record that.
        """
        if torch.is_grad_enabled() != self._with_gradients:
            raise TypeError("it switches gradients on or off")
        return super().create_node(kind, target, args, kwargs, name, None if isinstance(type_expr, str) else type_expr)

    def create_arg(self, a: Any) -> Any:
        """Turn numpy's numbers, and other numbers of a class of their own, into plain ones, because the graph is written as text."""
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
        """Call a function and note its error, because code may catch the error and go on as if it had been its own."""
        try:
            return function(obj)
        except Exception as error:
            self.failures.append((sentence(error), self.running[-1] if self.running else None))
            raise

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ParameterProxy(node, self) if node.op == "get_attr" else ValueProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or stays_whole(m) is not None or m in self.shared or type(m) in self.opaque

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Trace each argument that has a default with that default. The graph refuses any other value when it is called."""
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
    """Give the graph's forward the order of arguments that the traced forward has.

    torch.fx would put ``*args`` after arguments that are taken by keyword alone.
    """
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
    """Raise `TypeError` in code that enters autocast, because a graph can't record that."""

    def refuse(_: Any) -> None:
        raise TypeError("it switches autocast on or off")

    enter = torch.autocast.__enter__
    torch.autocast.__enter__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


def sentence(error: Exception) -> str:
    """Return the first sentence of an error, without torch.fx's advice.

    It is kept instead of the error, because the error's frames would keep the model alive.
    """
    return first_line(error).split(". ")[0]


def require_default(value: object, name: str, default: object) -> None:
    """Raise InvalidInput for a value other than the default that the graph was traced with."""
    tensors = isinstance(value, Tensor) or isinstance(default, Tensor)
    if value is not default and (tensors or value != default):
        raise InvalidInput(f"this module was traced with {name}={default!r} and can't be called with another value.")

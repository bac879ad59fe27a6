"""A tracer for torch.fx that records what the code does: writing in place, arguments with defaults, iterating over a parameter."""

from __future__ import annotations

import inspect
import itertools
import operator
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator
from typing import Any

from torch import Tensor, fx, nn

from repfx.block import RepBlock
from repfx.errors import InvalidInput
from repfx.leaves import is_leaf
from repfx.meaning import has_hooks

# functions of libraries that no trace gets through, with nothing in them to rewrite
_LEAF_FUNCTIONS = {"timm.layers.padding": ("pad_same",)}


class Tracer(fx.Tracer):
    """Leaves are convs, BatchNorms, and all that holds none of them or has hooks; the blocks in `shared`, and the `opaque` classes."""

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
        self.running: list[nn.Module] = []  # whose code runs now; after an error, whose code failed

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.block_calls[m] += isinstance(m, RepBlock)
        self.running.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.running.pop()
        return result

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ParameterProxy(node, self) if node.op == "get_attr" else _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or has_hooks(m) or m in self.shared or type(m) in self.opaque

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


class _Proxy(fx.Proxy):
    """Records ``x += y`` and ``x[…] = y`` as what they are.

    torch.fx's own proxy takes the one for ``x = x + y``, which leaves x as it was, and refuses the other.
    """

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _ParameterProxy(_Proxy):
    """A parameter or buffer, of which it is known how long it is."""

    def __iter__(self) -> Iterator[Any]:
        root: Any = self.tracer.root  # type: ignore[attr-defined]
        tensors = {**dict(root.named_buffers()), **dict(root.named_parameters(remove_duplicate=False))}
        whole: Any = self
        return iter([whole[index] for index in range(len(tensors[str(self.node.target)]))])


def require_default(value: object, name: str, default: object) -> None:
    """Refuse a value other than the one that the graph was traced with."""
    tensors = isinstance(value, Tensor) or isinstance(default, Tensor)
    if value is not default and (tensors or value != default):
        raise InvalidInput(f"this module was traced with {name}={default!r} and can't be called with another value.")

"""Constants of a graph: numbers, tensors and sizes that it computes from parameters alone, so they are the same for every input.

For example, a weight that forward standardizes, sums or masks is a constant. Constants are computed in float64 from the current parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.graphs.aliasing import has_code_of_others, may_share_memory, mutated_by
from repfx.records.module_tree import attribute


class NotConstant(Exception):
    """A value depends on the input, on chance, or on something that the graph changes."""


@dataclass(frozen=True)
class _Varies:
    """The mark of a node that is not constant, with the reason.

    Storing the exception instead would keep its traceback, and every tensor in it, alive.
    """

    reason: str


# parts of the names of calls whose arguments don't determine the result
_BY_CHANCE = (
    "rand",
    "normal",
    "bernoulli",
    "multinomial",
    "binomial",
    "poisson",
    "dropout",
    "empty",
    "exponential",
    "gumbel",
    "rrelu",
    "fractional_max_pool",
)
_TORCH = ("torch", "_operator", "math", "builtins")


class Constants:
    """The constants of one graph.

    >>> graph = fx.Graph()
    >>> weight = graph.get_attr("weight")
    >>> total = graph.call_function(torch.sum, (graph.call_function(torch.neg, (weight,)),))
    >>> Constants(graph, nn.Linear(3, 2).requires_grad_(False)).tensor(total).dtype
    torch.float64
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self._root = root
        written = [tensor for node in graph.nodes if (tensor := mutated_by(node, root)) is not None]
        self._changing = {
            str(node.target) for tensor in written for node in may_share_memory(tensor, root) if node.op == "get_attr"
        }
        self._own_code = {
            str(node.target) for node in graph.nodes if node.op == "call_module" and has_code_of_others(node, root)
        }
        self._known: dict[fx.Node, Any] = {}

    def changes(self, path: str) -> bool:
        """Whether the graph writes into a tensor of the module at a path."""
        return any(target.startswith(f"{path}.") for target in self._changing)

    def number(self, value: Any) -> Tensor | float | None:
        """Return a value as a number or real tensor if it depends on no input, else None."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        return self.tensor(value)

    def tensor(self, value: Any) -> Tensor | None:
        """Return a value as a real tensor if it depends on no input, else None. Floating-point tensors are in float64."""
        try:
            found = self.literal(value)
        except NotConstant:
            return None
        return found if isinstance(found, Tensor) and not found.is_complex() else None

    def literal(self, value: Any) -> Any:
        """Return a value of any type that depends on no input.

        Raises:
            NotConstant: the value depends on the input, on chance, or on something that the graph changes.
        """
        found: Any = fx.node.map_arg(value, self._value_of)
        return found

    def depends_on_parameters_alone(self, node: fx.Node) -> bool:
        """Whether a node is constant, so that it can be left out if nothing uses it."""
        try:
            self.literal(node)
        except NotConstant:
            return False
        return True

    def _value_of(self, node: fx.Node) -> Any:
        if node not in self._known:
            self._known[node] = self._compute(node)
        found = self._known[node]
        if isinstance(found, _Varies):
            raise NotConstant(found.reason)
        return found

    def _compute(self, node: fx.Node) -> Any:
        """Compute the value of a node, or return the reason why it is not constant."""
        if node.op == "get_attr":
            if node.target in self._changing or any(str(node.target).startswith(f"{path}.") for path in self._own_code):
                return _Varies(f"the graph changes {node.target}, or may change it")
            return _float64(attribute(self._root, str(node.target)))
        if not is_pure(node) or mutated_by(node, self._root) is not None:
            return _Varies(f"{node.name} isn't computed from parameters alone")
        try:
            args, kwargs = self.literal(node.args), self.literal(node.kwargs)
            with torch.no_grad():
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # operands may not fit together once they are float64; then the node is no constant
            return _Varies(str(error))


def is_pure(node: fx.Node) -> bool:
    """Whether a node calls a function of torch or Python that neither draws random numbers nor creates uninitialised tensors."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if (any(part in name for part in _BY_CHANCE) and name != "normalize") or not node.all_input_nodes:
        return False
    if node.op == "call_method":
        return True
    module = getattr(node.target, "__module__", None) or ""
    return node.op == "call_function" and (module.split(".")[0] in _TORCH or module == "")


def _float64(value: Any) -> Any:
    """Detach a tensor and, if it is floating-point and not on mps, convert it to float64. Return any other value as it is."""
    if not isinstance(value, Tensor):
        return value
    wide = value.is_floating_point() and value.device.type != "mps"
    return value.detach().to(torch.float64) if wide else value.detach()

"""Constants of a graph: numbers, tensors and sizes that it computes from parameters alone, so they are the same for every input.

For example, a weight that forward standardizes, sums or masks is a constant. Constants are computed in float64 from the current parameters.
A cast that rounds to fewer bits rounds there, too; no other cast changes anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
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
_MOVES = frozenset({"cpu", "cuda"})  # methods that change a tensor's device alone
_NAMED_CASTS = {"half": torch.half, "bfloat16": torch.bfloat16, "float": torch.float, "double": torch.double}
CASTS = frozenset({"to", "type", "type_as", *_NAMED_CASTS})  # methods that may change a tensor's dtype


class Constants:
    """The constants of one graph.

    >>> graph = fx.Graph()
    >>> weight = graph.get_attr("weight")
    >>> total = graph.call_function(torch.sum, (graph.call_function(torch.neg, (weight,)),))
    >>> Constants(graph, nn.Linear(3, 2).requires_grad_(False)).tensor(total).dtype
    torch.float64
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph, self.root = graph, root
        written = [tensor for node in graph.nodes if (tensor := mutated_by(node, root)) is not None]
        self._written = {node for tensor in written for node in may_share_memory(tensor, root)}
        self._changing = {str(node.target) for node in self._written if node.op == "get_attr"}
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
        reason = self._why_not(node)
        if reason is not None:
            return _Varies(reason)
        if node.op == "get_attr":
            return self.held(_held_at(self.root, str(node.target)))
        try:
            args, kwargs = self.literal(node.args), self.literal(node.kwargs)
            with torch.no_grad():
                return self._called(node, *args, **kwargs)
        except Exception as error:  # operands may not fit together once they are float64; then the node is no constant
            return _Varies(str(error))

    def _why_not(self, node: fx.Node) -> str | None:
        """Return the reason why a node isn't constant even if it depends on no input; None if there is no reason."""
        if node.op == "get_attr":
            changed = node.target in self._changing
            may_change = any(str(node.target).startswith(f"{path}.") for path in self._own_code)
            return f"the graph changes {node.target}, or may change it" if changed or may_change else None
        if not is_pure(node):
            return f"{node.name} isn't computed from parameters alone"
        if node in self._written:
            return f"the graph changes {node.name} in place"
        return f"{node.name} writes in place" if mutated_by(node, self.root) is not None else None

    def _called(self, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        if callable(node.target):
            return node.target(*args, **kwargs)
        cast = node.target in CASTS | _MOVES and isinstance(args[0], Tensor)
        return self.cast(node, *args, **kwargs) if cast else getattr(args[0], node.target)(*args[1:], **kwargs)

    def held(self, value: Any) -> Any:
        """Return what the root holds as constants are computed with it: a floating-point tensor in float64, unless it is on mps."""
        if not isinstance(value, Tensor):
            return value
        wide = value.is_floating_point() and value.device.type != "mps"
        return value.detach().to(torch.float64) if wide else value.detach()

    def cast(self, node: fx.Node, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what a cast makes of a tensor: rounded if the graph's cast rounds, and then as `held` returns it."""
        moved = getattr(tensor, str(node.target))(*args, **kwargs)
        form, before = self.forms.of(node), self.forms.of(node.all_input_nodes[0])
        if form is None or before is None:
            return self.held(moved)
        exact = before.is_floating_point() and holds(form.dtype, before.dtype)
        return self.held((tensor if exact else tensor.to(form.dtype)).to(moved.device))

    @cached_property
    def forms(self) -> Forms:
        """The forms of the graph's constants."""
        return Forms(self.graph, self.root)


class Forms(Constants):
    """The constants of one graph as tensors without numbers, each in the dtype that it has when the graph runs.

    >>> graph = fx.Graph()
    >>> weight = graph.get_attr("weight")
    >>> halved = graph.call_method("half", (graph.call_method("flatten", (weight,)),))
    >>> form = Forms(graph, nn.Linear(3, 2)).of(halved)
    >>> form.shape, form.dtype
    (torch.Size([6]), torch.float16)
    """

    def of(self, node: fx.Node) -> Tensor | None:
        """Return the form of a tensor, or None if the node is no tensor, depends on an input, or has a shape that depends on numbers."""
        return self.tensor(node)

    def held(self, value: Any) -> Any:
        return value.detach().to("meta") if isinstance(value, Tensor) else value

    def cast(self, node: fx.Node, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if node.target in _MOVES:
            return tensor
        dtype = _dtype_of_cast(str(node.target), tensor, *args, **kwargs)
        return tensor.type() if dtype is None else tensor.to(dtype)


def holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype holds every number of another one."""
    return torch.promote_types(dtype, other) is dtype


def draws(node: fx.Node) -> bool:
    """Whether a node calls a function or a method that may draw random numbers, or that creates uninitialised tensors."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return any(part in name for part in _BY_CHANCE) and name != "normalize"


def is_pure(node: fx.Node) -> bool:
    """Whether a node calls a function of torch or Python that neither draws random numbers nor creates uninitialised tensors."""
    if draws(node) or not node.all_input_nodes:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace == "aten" and torch.Tag.nondeterministic_seeded not in node.target.tags
    if node.op == "call_method":
        return True
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    module = getattr(node.target, "__module__", None) or ""
    return node.op == "call_function" and (module.split(".")[0] in _TORCH or module == "")


def _held_at(root: nn.Module, path: str) -> Any:
    """Return what a module holds at a path. A parameter is read from its table, because code gets a proxy for it while it is traced."""
    owner, _, name = path.rpartition(".")
    for table in (vars(root.get_submodule(owner)).get(kind) for kind in ("_parameters", "_buffers")):
        if isinstance(table, dict) and name in table:
            return dict.__getitem__(table, name)
    return attribute(root, path)


def _dtype_of_cast(method: str, tensor: Tensor, *args: Any, **kwargs: Any) -> torch.dtype | None:
    """Return the dtype that a cast gives a tensor; None if it is given as a text, or asked for."""
    if method in _NAMED_CASTS:
        return _NAMED_CASTS[method]
    named = [*args, *kwargs.values()]
    if not named or (method == "type" and not isinstance(named[0], torch.dtype)):
        return None
    given = [each.dtype if isinstance(each, Tensor) else each for each in named]
    return next((each for each in given if isinstance(each, torch.dtype)), tensor.dtype)


def computed_from_parameters(node: fx.Node) -> bool:
    """Whether no input and no module's output is among what a node is computed from. It may still be drawn, or written to."""
    return all(source.op not in ("placeholder", "call_module") for source in origins(node))


def origins(node: fx.Node) -> Iterator[fx.Node]:
    """Yield all nodes that a node is computed from, itself first."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        source = pending.pop()
        if source not in found:
            found.add(source)
            yield source
            pending += source.all_input_nodes

"""Modules of anybody that are a leaf in graphs, read by their own code: drops of rate 0, scales and shifts per channel, permutations.

Such a module has no children, and only tensors with one number per channel. Its code is traced by itself. A graph around it keeps
calling the module as long as no rule merges it.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import code_of_its_own, has_hooks
from repfx.algebra.meaning import Kind, Meaning
from repfx.graphs.aliasing import mutated_by
from repfx.graphs.calls_with_tensors import axes_of_constants, read_call_with_tensors
from repfx.graphs.constants import Constants
from repfx.graphs.operations import Op, read_op
from repfx.tracing.leaves import is_leaf
from repfx.tracing.trace import trace


@dataclass(frozen=True)
class LeafCode:
    """The code of a module as a graph of one input.

    Args:
        module: the module, with all that the graph calls and reads.
        source, result: the input and the output of the graph.
    """

    module: nn.Module
    source: fx.Node
    result: fx.Node

    @cached_property
    def constants(self) -> Constants:
        """The values that the code computes from the module's tensors alone."""
        return Constants(self.source.graph, self.module)

    @cached_property
    def steps(self) -> tuple[Op, ...] | None:
        """The linear maps that lead from the input to the output, in their order, or None if other code does."""
        steps: list[Op] = []
        node = self.result
        while node is not self.source:
            op = read_op(node, self.module, self.constants) or read_call_with_tensors(node, self.module, self.constants)
            if op is None:
                return None
            steps.insert(0, op)
            node = op.source
        return tuple(steps) if self._writes_nothing_else(steps) else None

    def _writes_nothing_else(self, steps: list[Op]) -> bool:
        """Whether code writes in place only where a step writes over an input that nothing else reads."""
        own = {op.node: op.source for op in steps}
        for node in self.source.graph.nodes:
            written = mutated_by(node, self.module)
            if written is not None and (own.get(node) is not written or len(written.users) > 1):
                return False
        return True

    @cached_property
    def meaning(self) -> Meaning | None:
        """The linear map that the code is, or None. It may change with each of the module's attributes."""
        steps = self.steps
        kind = None if steps is None else _kind_of_all(steps)
        if steps is None or kind is None:
            return None

        def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
            total = Kernel.identity(like, channels=channels, dimensions=dimensions)
            for op in steps:
                total = total.compose(op.meaning.build(like, total.out_channels, dimensions))
            return total

        dimensions = {op.meaning.dimensions for op in steps} - {None}
        channels = (op.meaning.in_channels for op in steps if op.meaning.in_channels is not None)
        return Meaning(kind, next(iter(dimensions), None), next(channels, None), build, lasts=False)

    @property
    def axes(self) -> int:
        """The most axes of the tensors that the steps scale and shift by."""
        return max((axes_of_constants(op.node, self.constants) for op in self.steps or ()), default=0)


def _kind_of_all(steps: tuple[Op, ...]) -> Kind | None:
    """Return the kind of several maps in a row, or None if they differ in kind or number of axes."""
    kinds = [op.meaning.kind for op in steps if op.meaning.kind != "identity"]
    if len({op.meaning.dimensions for op in steps} - {None}) > 1:
        return None
    if set(kinds) <= {"affine"} or len(kinds) == 1:
        return kinds[0] if kinds else "identity"
    return None


Known: TypeAlias = dict[Hashable, "tuple[fx.Node, fx.Node, dict[str, Any]] | None"]


def code_of(module: nn.Module, known: Known) -> LeafCode | None:
    """Return the code of a leaf as a graph, or None if it isn't simple enough or can't be traced.

    Args:
        known: graphs of leaves that were traced before. Leaves that are alike but for their numbers have one graph.
    """
    if not _is_simple(module):
        return None
    form = _form_of(module)
    found = known[form] if form in known else _traced(module)
    if form is not None:
        known[form] = found
    if found is None:
        return None
    source, result, parts = found
    return LeafCode(_with(module, parts), source, result)


def _traced(module: nn.Module) -> tuple[fx.Node, fx.Node, dict[str, Any]] | None:
    """Return the input and the output of the graph of a module, and what it needs besides. None if there is none."""
    islands = trace(module).islands
    if len(islands) != 1 or islands[0].path:
        return None
    nodes = list(islands[0].graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    result = nodes[-1].args[0]
    return (inputs[0], result, islands[0].constants) if inputs and isinstance(result, fx.Node) else None


def _form_of(module: nn.Module) -> Hashable | None:
    """Return all that the graph of a module can depend on: its class, plain values and the shapes of its tensors. None if there is more."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    if not all(map(_is_plain, own.values())):
        return None
    tensors = {**module._parameters, **module._buffers}
    shapes = ((name, None if each is None else (each.shape, each.dtype)) for name, each in tensors.items())
    return (type(module), module.training, frozenset(own.items()), frozenset(shapes))


def _is_plain(value: object) -> bool:
    plain = isinstance(value, (bool, int, float, str, type(None)))
    return plain or (isinstance(value, tuple) and all(map(_is_plain, value)))


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _is_simple(module: nn.Module) -> bool:
    own = not type(module).__module__.startswith(("torch.", "repfx."))
    if not own or module._modules or has_hooks(module) or code_of_its_own(module) is not None or not is_leaf(module):
        return False
    tensors = (*module.parameters(), *module.buffers())
    return all(sum(size > 1 for size in tensor.shape) <= 1 for tensor in tensors)


def _with(module: nn.Module, parts: dict[str, Any]) -> nn.Module:
    """Return a module with the same tensors, and with these parts."""
    twin = copy.copy(module)
    vars(twin).update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    for name, part in parts.items():
        setattr(twin, name, part)
    return twin

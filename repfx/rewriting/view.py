"""`View`: a graph as patterns and guards see it, each node read as a linear map where it may be touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import has_hooks, has_tensors, is_batch_norm, is_conv
from repfx.algebra.meaning import Meaning, refusal_of
from repfx.calls.carriers import Carrier, read_carrier
from repfx.calls.leaf_code import LeafCode, code_of
from repfx.calls.with_tensors import axes_of_constants, read_call_with_tensors
from repfx.graphs.constants import Constants
from repfx.graphs.functional_conv import is_functional_conv
from repfx.graphs.operations import Op, read_op, split
from repfx.graphs.viewed_norm import read_viewed_norm

META = torch.empty((), device="meta", dtype=torch.float64)


@dataclass
class View:
    """A graph as patterns and guards see it.

    Args:
        root: the module the graph belongs to.
        calls: how often each module is called in the whole model, by path in `root`.
        registered: under how many paths each module is registered, by path in `root`.
        kernels: kernels of the nodes that rules have already merged, in float64 as long as they may be merged further.
        input_axes: function from a path in `root` to the number of axes of that module's input; None if it isn't known.
    """

    root: nn.Module
    graph: fx.Graph
    calls: Counter[str]
    registered: Counter[str]
    kernels: dict[fx.Node, Kernel] = field(default_factory=dict)
    input_axes: Callable[[str], int | None] = lambda path: None

    def __post_init__(self) -> None:
        read = {str(node.target).rpartition(".")[0] for node in self.graph.nodes if node.op == "get_attr"}
        self._read_elsewhere = read
        self._ops: dict[fx.Node, Op | None] = {}
        self._codes: dict[str, LeafCode | None] = {}
        self.constants = Constants(self.graph, self.root)

    def op(self, node: fx.Node) -> Op | None:
        """Return the node as a linear map that may be moved and merged, or None. A reading holds until the graph has changed."""
        if node not in self._ops:
            self._ops[node] = self._read(node)
        return self._ops[node]

    def graph_changed(self) -> None:
        """Forget what was read, so that each node is read anew."""
        self._ops.clear()

    def set_kernel(self, node: fx.Node, kernel: Kernel) -> None:
        """Give this kernel to a node that rules have merged."""
        self.kernels[node] = kernel
        self._ops.pop(node, None)

    def _read(self, node: fx.Node) -> Op | None:
        if node in self.kernels:
            kernel = self.kernels[node]
            sizes = (kernel.dimensions, kernel.in_channels)
            meaning = Meaning("conv", *sizes, lambda like, channels, n: kernel.to(like))
            return Op(node, node.all_input_nodes[0], meaning)
        if self.refusal(node):
            return None
        found = read_op(node, self.root, self.constants) or read_call_with_tensors(node, self.root, self.constants)
        return found or self._leaf(node) or self._viewed_norm(node)

    def _leaf(self, node: fx.Node) -> Op | None:
        code = self.code(node)
        meaning = None if code is None else code.meaning
        return Op(node, node.all_input_nodes[0], meaning) if meaning is not None else None

    def code(self, node: fx.Node) -> LeafCode | None:
        """Return the code of the module that a node calls with one input, or None if the module isn't read by its code."""
        module = self.module(node)
        if module is None or len(node.args) != 1 or node.kwargs or len(node.all_input_nodes) != 1:
            return None
        if node.target not in self._codes:
            self._codes[str(node.target)] = None if node in self.kernels else code_of(module)
        return self._codes[str(node.target)]

    def carriers(self, node: fx.Node) -> tuple[Carrier, ...]:
        """Return what a node does as one carrier, or as several if it calls a module whose code does that, or none."""
        if not isinstance(split(node)[0], fx.Node) or self.refusal(node):
            return ()
        carrier = read_carrier(node, self.root)
        if carrier is not None:
            return (carrier,)
        code = self.code(node)
        return () if code is None else code.carriers

    def axes_of_constants(self, node: fx.Node) -> int:
        """Return the most axes of the tensors that a node scales and shifts by."""
        code = self.code(node)
        return axes_of_constants(node, self.constants) if code is None else code.axes

    def _viewed_norm(self, node: fx.Node) -> Op | None:
        normed = node.args[0] if node.op in ("call_method", "call_function") and node.args else None
        norm = self.module(normed) if isinstance(normed, fx.Node) else None
        if not isinstance(normed, fx.Node) or norm is None or not is_batch_norm(norm) or self.refusal(normed):
            return None
        return read_viewed_norm(node, norm, normed, self.input_axes(str(normed.target)))

    def refusal(self, node: fx.Node) -> str | None:
        """Why the module that a node calls must stay as it is, or None."""
        if node.op != "call_module" or node in self.kernels:
            return None
        path = str(node.target)
        module = self.root.get_submodule(path)
        if has_hooks(module):
            return f"{type(module).__name__} has hooks, which would no longer see what they see now"
        if not has_tensors(module):
            return None
        if self.calls[path] > 1:
            return f"it is called {self.calls[path]} times; a change would change every call"
        if self.registered[path] > 1:
            return f"it is registered under {self.registered[path]} names"
        if self.constants.changes(path):
            return "its parameters are changed in forward"
        if path in self._read_elsewhere and not is_batch_norm(module):  # no rewrite changes a BatchNorm's tensors
            return "its parameters are read elsewhere in the model"
        if any(tensor.is_complex() for tensor in module.parameters()):
            return "its weights are complex"
        return refusal_of(module)

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, or None."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def is_conv(self, node: fx.Node) -> bool:
        """Whether a node is a convolution or a linear layer with weights of its own."""
        module = self.module(node)
        if node in self.kernels or is_functional_conv(node):
            return True
        return module is not None and (is_conv(module) or isinstance(module, nn.Linear))

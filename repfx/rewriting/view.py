"""`View`: a graph as patterns and guards see it, each node read as a linear map where it may be touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.cost import Cost, Shape, weights
from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import has_hooks, has_tensors, is_batch_norm, is_conv_or_linear
from repfx.algebra.meaning import Meaning, refusal_of
from repfx.graphs.calls_with_tensors import axes_of_constants, read_call_with_tensors
from repfx.graphs.constants import Constants
from repfx.graphs.functional_conv import is_functional_conv
from repfx.graphs.operations import Op, read_op
from repfx.graphs.sums import SumOf, read_sum
from repfx.graphs.viewed_norm import read_viewed_norm
from repfx.records.module_tree import called_by
from repfx.tracing.leaf_code import Known, LeafCode, code_of

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
        input_shape: function from a path in `root` to the shape of that module's input; None if it isn't known.
        cost: the cost of a conv with an input of some shape.
        inputs: what a caller gives the graph, by the name of the argument.
        pads_apart: whether a conv can pad its two sides differently, as ONNX's can and torch's can't.
        takes_ones: whether a channel of ones may be put beside the input of a conv, in a node of its own.
    """

    root: nn.Module
    graph: fx.Graph
    calls: Counter[str]
    registered: Counter[str]
    kernels: dict[fx.Node, Kernel] = field(default_factory=dict)
    input_axes: Callable[[str], int | None] = lambda path: None
    input_shape: Callable[[str], Shape | None] = lambda path: None
    cost: Cost = weights
    inputs: Mapping[str, object] = field(default_factory=dict)
    pads_apart: bool = False
    takes_ones: bool = True

    def __post_init__(self) -> None:
        self._readers: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self._readers.setdefault(str(node.target).rpartition(".")[0], []).append(node)
        self._ops: dict[fx.Node, Op | None] = {}
        self._shapes: dict[fx.Node, Shape | None] = {}
        self._codes: dict[str, LeafCode | None] = {}
        self._graphs: Known = {}
        self.constants = Constants(self.graph, self.root)

    def op(self, node: fx.Node) -> Op | None:
        """Return the node as a linear map that may be moved and merged, or None. A reading holds until the graph has changed."""
        if node not in self._ops:
            self._ops[node] = self._read(node)
        return self._ops[node]

    def sum_of(self, node: fx.Node) -> SumOf | None:
        """Return the node as a sum of nodes, or None."""
        return read_sum(node, self.constants)

    def graph_changed(self) -> None:
        """Forget what was read, so that each node is read anew."""
        self._ops.clear()

    def set_kernel(self, node: fx.Node, kernel: Kernel) -> None:
        """Give this kernel to a node that rules have merged."""
        self.kernels[node] = kernel
        self._ops.pop(node, None)

    def set_shape(self, node: fx.Node, shape: Shape | None) -> None:
        """Note the shape of the input of a node that rules have merged."""
        self._shapes[node] = shape

    def shape_before(self, node: fx.Node) -> Shape | None:
        """Return the shape of the input of a node, or None if it isn't known, or if no cost depends on it."""
        if self.cost is weights:  # to find a shape, the model runs once
            return None
        if node in self._shapes or node.op != "call_module":
            return self._shapes.get(node)
        return self.input_shape(str(node.target))

    def cost_of(self, kernel: Kernel, shape: Shape | None) -> float:
        """Return the cost of a kernel as one conv for an input of `shape`. A channel of ones may come on top."""
        if shape is not None and kernel.dimensions:
            shape = (*shape[: -kernel.dimensions - 1], kernel.in_channels, *shape[-kernel.dimensions :])
        return self.cost(ConvSpec.of_kernel(kernel), shape)

    def op_for(self, node: fx.Node, readers: Collection[fx.Node]) -> Op | None:
        """Return the node as a linear map, or None. Only nodes that go with it may read its parameters besides `readers`."""
        op = self.op(node)
        only_read = self._is_read(node) and self._refusal_of_module(node) is None
        if op is None and only_read and not self._is_read_outside(str(node.target), readers):
            op = read_op(node, self.root, self.constants)
        return op

    def _is_read_outside(self, path: str, inside: Collection[fx.Node]) -> bool:
        """Whether anything but the nodes `inside` depends on the parameters of the module at a path, besides its call."""
        pending = [user for reader in self._readers[path] for user in reader.users]
        while pending:
            node = pending.pop()
            if node in inside:
                continue
            if not self.constants.depends_on_parameters_alone(node):
                return True
            pending += node.users
        return False

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
            self._codes[str(node.target)] = None if node in self.kernels else code_of(module, self._graphs)
        return self._codes[str(node.target)]

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
        reason = self._refusal_of_module(node)
        return "its parameters are read elsewhere in the model" if reason is None and self._is_read(node) else reason

    def _is_read(self, node: fx.Node) -> bool:
        """Whether the graph reads parameters of the module that a node calls. Those of a BatchNorm don't count: no rewrite changes them."""
        if node.op != "call_module" or node in self.kernels or str(node.target) not in self._readers:
            return False
        module = called_by(self.root, node)
        return has_tensors(module) and not is_batch_norm(module)

    def _refusal_of_module(self, node: fx.Node) -> str | None:
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
        if any(tensor.is_complex() for tensor in module.parameters()):
            return "its weights are complex"
        return refusal_of(module)

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, or None."""
        return called_by(self.root, node) if node.op == "call_module" else None

    def is_conv(self, node: fx.Node) -> bool:
        """Whether a node is a convolution or a linear layer with weights of its own."""
        module = self.module(node)
        if node in self.kernels or is_functional_conv(node):
            return True
        return module is not None and is_conv_or_linear(module)

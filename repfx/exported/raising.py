"""`raised`: a graph of ATen operators as a graph that rules read, with layers and functions of torch in place of operators.

A conv whose weight is a tensor of the program becomes a call of a conv module that holds this tensor. So does a BatchNorm with running
statistics. An operator that means a function of torch becomes a call of it. Any other node stays the call that it is, and no rule reads it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra.baking import CONV_OF
from repfx.exported.layers import NORM_OF, conv_layer, norm_layer, sizes_of
from repfx.exported.nodes import first_output, flat_inputs, shape_of, stacked, twins_of, unused_nodes
from repfx.exported.operators import (
    ConvCall,
    NormCall,
    arguments_of,
    conv_call,
    name_of,
    norm_call,
    replaced_whole,
    tensors_written,
    torch_call,
)
from repfx.exported.source import Source
from repfx.graphs.constants import is_pure
from repfx.records.module_tree import attribute, called_by, has, set_submodule
from repfx.records.report import Skip

IN_TRAINING_MODE = "it was exported in training mode: call model.eval() before torch.export.export"
BY_BATCH = "it keeps no running statistics, so it isn't a fixed map"
_CALLED_MORE = "it is the graph of {}, which is left as it is"


@dataclass
class Raised:
    """A raised graph, and how its nodes go back.

    Args:
        root: the module that the graph belongs to.
        origins: the node of the source that each node of the graph stands for.
        raised: the node of the graph that has the value of a node of the source.
        inputs: the nodes that a node of the graph read when it was made, in their order, with repetitions.
        skips: what can't be read, and why.
    """

    graph: fx.Graph
    root: nn.Module
    origins: dict[fx.Node, fx.Node] = field(default_factory=dict)
    raised: dict[fx.Node, fx.Node] = field(default_factory=dict)
    inputs: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)

    def axes(self, path: str) -> int | None:
        """Return the number of axes of the input of the module at a path, or None if it isn't known or calls differ."""
        counts = {None if shape is None else len(shape) for shape in self._input_shapes(path)}
        return counts.pop() if len(counts) == 1 else None

    def shape(self, path: str) -> tuple[int, ...] | None:
        """Return the shape of the input of the module at a path, free sizes as in the program's example; None if it isn't known."""
        shapes = set(self._input_shapes(path))
        shape = shapes.pop() if len(shapes) == 1 else None
        return None if shape is None or None in shape else shape  # type: ignore[return-value]

    def _input_shapes(self, path: str) -> list[tuple[int | None, ...] | None]:
        calls = [node for node in self.origins if node.op == "call_module" and node.target == path]
        return [shape_of(self.origins[self.inputs[node][0]]) for node in calls]


def raised(source: Source) -> Raised:
    """Return the graph of a source as rules read it. The source is left as it is."""
    return _Raising(source).run()


class _Raising:
    def __init__(self, source: Source) -> None:
        self._source = source
        self._result = Raised(fx.Graph(), nn.Module())
        self._layers: dict[str, tuple[Any, nn.Module]] = {}  # what identifies the layer at each path, and the layer
        self._varying: set[fx.Node] = set()  # raised nodes that depend on an input
        self._owners = {"", *(name.rpartition(".")[0] for name in source.tensors)}
        self._unused = unused_nodes(source.graph)
        self._constant: set[fx.Node] = set()  # nodes of the source that depend on its tensors alone

    def run(self) -> Raised:
        for node in self._source.graph.nodes:
            if node in self._unused:
                continue
            if self._is_constant(node):
                self._constant.add(node)  # raised where it is needed, if it is
            elif node not in self._result.raised:
                self._raise(node)
        self._result.root.eval()
        self._place()
        return self._result

    def _raise(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            made = self._leaf(node)
        elif node.op == "call_function":
            made = self._layer(node) or self._norm(node) or self._function(node) or self._as_it_is(node)
        else:
            made = self._as_it_is(node)
        self._note(node, made)

    def _note(self, node: fx.Node, made: fx.Node) -> None:
        self._result.raised[node] = made
        self._result.origins.setdefault(made, node)
        self._result.inputs.setdefault(made, flat_inputs(made))
        inputs = self._result.inputs[made]
        if made.op in ("placeholder", "call_module") or any(each in self._varying for each in inputs):
            self._varying.add(made)

    def _is_tensor(self, node: fx.Node) -> bool:
        """Whether a node only reads something that the program holds and doesn't change."""
        return (node in self._source.names or node.op == "get_attr") and node not in self._source.changing

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a node computes something from the program's tensors alone, and does nothing else."""
        if self._is_tensor(node):
            return True
        inputs = node.all_input_nodes
        return is_pure(node) and not tensors_written(node) and all(each in self._constant for each in inputs)

    def _value(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, self._raised)

    def _raised(self, node: fx.Node) -> fx.Node:
        if node not in self._result.raised:
            self._raise(node)
        return self._result.raised[node]

    def _leaf(self, node: fx.Node) -> fx.Node:
        """Return a tensor that stays as it is as an attribute, and one that changes as an input."""
        graph = self._result.graph
        if self._is_tensor(node):
            return graph.create_node("get_attr", self._source.names.get(node, node.target), name=node.name)
        return graph.create_node("placeholder", node.name, name=node.name)

    def _as_it_is(self, node: fx.Node) -> fx.Node:
        self._skip_subgraphs(node)
        args, kwargs = self._value(node.args), self._value(node.kwargs)
        return self._result.graph.create_node(node.op, node.target, args, kwargs, name=node.name)

    def _skip_subgraphs(self, node: fx.Node) -> None:
        """Note that the graphs which a node gets, such as the branches of `torch.cond`, stay as they are."""
        for each in node.all_input_nodes if node.op == "call_function" else ():
            graph = attribute(self._source.root, str(each.target)) if each.op == "get_attr" else None
            if isinstance(graph, fx.GraphModule) and any(conv_call(n) or norm_call(n) for n in graph.graph.nodes):
                name = getattr(node.target, "__name__", str(node.target))
                self._result.skips.append(Skip(str(each.target), _CALLED_MORE.format(name)))

    def _function(self, node: fx.Node) -> fx.Node | None:
        first = node.args[0] if node.args else None
        whole = replaced_whole(node)
        if whole is not None:
            return self._raised(whole)
        stack = stacked(node)
        if stack is not None:
            return self._create(node, "call_function", torch.stack, stack, {})
        shape = shape_of(first) if isinstance(first, fx.Node) else None
        call = torch_call(node, None if shape is None else len(shape))
        if call is None:
            return None
        kind, target, args, kwargs = call
        return self._create(node, kind, target, args, kwargs)

    def _create(self, node: fx.Node, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        made = self._result.graph.create_node(kind, target, self._value(args), self._value(kwargs), name=node.name)
        made.meta = {"nn_module_stack": self._stack(node)}
        return made

    def _stack(self, node: fx.Node) -> dict[str, Any]:
        """Return the modules whose code made a node, as far as the program has tensors of them."""
        stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
        return {key: value for key, value in stack.items() if value[0] in self._owners}

    # ---- layers

    def _layer(self, node: fx.Node) -> fx.Node | None:
        call = conv_call(node)
        if call is None or not isinstance(call.input, fx.Node):
            return None
        shape = shape_of(call.input)
        dimensions = self._dimensions(call)
        if dimensions and shape is not None and len(shape) != dimensions + 2:
            return self._as_it_is(node)  # an input without a batch
        weight = self._weight(call)
        held = self._holds(weight) and (call.bias is None or self._holds(call.bias))
        varies = self._raised(call.input) in self._varying
        layer = conv_layer(call, self._tensor(weight), self._tensor(call.bias)) if held and varies else None
        if layer is None:
            return self._functional_conv(node, call)
        key = (weight, call.bias, repr(layer))
        return self._call(node, self._path(weight, "weight", key, node), layer, key, call.input)

    def _dimensions(self, call: ConvCall) -> int | None:
        """Return the number of spatial axes of a conv, or None if it isn't known."""
        if call.dimensions is not None or not isinstance(call.weight, fx.Node):
            return call.dimensions
        shape = tuple(self._tensor(call.weight).shape) if self._holds(call.weight) else shape_of(call.weight)
        return None if shape is None else len(shape) - 2

    def _weight(self, call: ConvCall) -> Any:
        """Return the weight of a conv, or the tensor whose axes are swapped to make the weight of a linear layer's product."""
        if not call.turned:
            return call.weight
        name = name_of(call.weight) if isinstance(call.weight, fx.Node) else ""
        if name not in ("t.default", "permute.default", "transpose.int"):
            return None
        given = arguments_of(call.weight)
        if name == "transpose.int":
            swaps = {given["dim0"] % 2, given["dim1"] % 2} == {0, 1}
        else:
            swaps = list(given.get("dims", [1, 0])) in ([1, 0], [-1, 0])
        return given["self"] if swaps else None

    def _holds(self, node: Any) -> bool:
        """Whether an argument is a tensor of floating-point numbers that the program holds and doesn't change."""
        known = isinstance(node, fx.Node) and node in self._source.names and node not in self._source.changing
        return known and self._source.tensors[self._source.names[node]].is_floating_point()

    def _tensor(self, node: Any) -> Any:
        return self._source.tensors[self._source.names[node]] if isinstance(node, fx.Node) else None

    def _functional_conv(self, node: fx.Node, call: ConvCall) -> fx.Node | None:
        dimensions = self._dimensions(call)
        if dimensions == 0 and not call.turned:
            return self._create(node, "call_function", F.linear, (call.input, call.weight, call.bias), {})
        if dimensions not in CONV_OF or call.turned:
            return None
        padding = call.padding if isinstance(call.padding, str) else sizes_of(call.padding, dimensions)
        args: tuple[Any, ...] = (call.input, call.weight, call.bias, sizes_of(call.stride, dimensions), padding)
        dilation = sizes_of(call.dilation, dimensions)
        more: tuple[Any, ...]
        function: Any
        if call.transposed:
            more = (sizes_of(call.output_padding, dimensions), call.groups, dilation)
            function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dimensions]
        else:
            more = (dilation, call.groups)
            function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dimensions]
        return self._create(node, "call_function", function, (*args, *more), {})

    def _norm(self, node: fx.Node) -> fx.Node | None:
        call = norm_call(node)
        if call is None or not isinstance(call.input, fx.Node):
            return None
        result = node if not call.several_outputs else first_output(node)
        place = self._name_of_layer(call.running_mean, call.weight, node)
        if call.by_batch:
            statistics = isinstance(call.running_mean, fx.Node)
            self._result.skips.append(Skip(place, IN_TRAINING_MODE if statistics else BY_BATCH))
            return None
        if result is None or not isinstance(call.eps, float):
            return None
        tensors = (call.running_mean, call.running_var, call.weight, call.bias)
        shape = shape_of(call.input)
        held = all(value is None or self._holds(value) for value in tensors) and call.running_mean is not None
        cls = NORM_OF.get(len(shape)) if shape is not None else None
        if not held or cls is None or self._raised(call.input) not in self._varying:
            made = self._norm_function(node, call)
        else:
            layer = norm_layer(cls, call, *map(self._tensor, tensors))
            key = (*tensors, repr(layer))
            made = self._call(node, self._path(call.running_mean, "running_mean", key, node), layer, key, call.input)
        for output in [result, *twins_of(result)] if result is not node else []:
            self._note_output(output, made)
        return made

    def _note_output(self, output: fx.Node, made: fx.Node) -> None:
        """Let an output of a node have the value of a raised node, which goes back to that output."""
        self._result.origins.setdefault(made, output)
        self._result.raised[output] = made

    def _norm_function(self, node: fx.Node, call: NormCall) -> fx.Node:
        args = (call.input, call.running_mean, call.running_var, call.weight, call.bias, False, 0.1, call.eps)
        return self._create(node, "call_function", F.batch_norm, args, {})

    def _name_of_layer(self, *nodes: Any) -> str:
        """Return the path of the layer that owns the first of these tensors, or the name of the last node."""
        known = [self._source.names[node] for node in nodes if isinstance(node, fx.Node) and node in self._source.names]
        return (known[0].rpartition(".")[0] if known else "") or nodes[-1].name

    def _path(self, tensor: fx.Node, attribute: str, key: Any, node: fx.Node) -> str:
        """Choose the path of a layer: that of the module that holds its tensor, if the tensor has the usual name there."""
        owner, _, name = self._source.names[tensor].rpartition(".")
        base = owner or node.name if name == attribute else f"{owner}.{name}".lstrip(".")
        path, number = base, 0
        while self._is_taken(path, key):
            number += 1
            path = f"{base}_{number}"
        return path

    def _is_taken(self, path: str, key: Any) -> bool:
        if path in self._layers:
            return bool(self._layers[path][0] != key)
        return has(self._source.root, path) and isinstance(attribute(self._source.root, path), fx.GraphModule)

    def _call(self, node: fx.Node, path: str, layer: nn.Module, key: Any, x: fx.Node) -> fx.Node:
        self._layers.setdefault(path, (key, layer))
        made = self._result.graph.create_node("call_module", path, (self._value(x),), name=node.name)
        made.meta = {"nn_module_stack": self._stack(node)}
        return made

    # ---- the root

    def _place(self) -> None:
        """Give the root what its graph calls and reads. Where a tensor would stand in the way of a layer, its path gets another end."""
        root = self._result.root
        for path in sorted(self._layers, key=lambda path: path.count(".")):
            set_submodule(root, path, self._layers[path][1])
        for node in self._result.graph.nodes:
            if node.op == "get_attr":
                node.target = _placed(root, node.target, self._held(self._result.origins[node]))
            elif node.op == "call_module" and not has(root, str(node.target)):
                set_submodule(root, str(node.target), called_by(self._source.root, node))

    def _held(self, node: fx.Node) -> Any:
        if node in self._source.names:
            return self._tensor(node)
        return attribute(self._source.root, str(node.target))


def _placed(root: nn.Module, path: str, value: Any) -> str:
    """Put a value at a path, or at a similar one if another value stands in the way. Return the path."""
    owner, _, name = path.rpartition(".")
    while True:
        place = f"{owner}.{name}".lstrip(".")
        if not has(root, place) and not _is_own_name(root, owner, name):
            break
        if has(root, place) and attribute(root, place) is value:
            return place
        name = f"{name}_"
    set_submodule(root, owner, nn.Module()) if owner and not has(root, owner) else None
    module = root.get_submodule(owner)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)
    return place


def _is_own_name(root: nn.Module, owner: str, name: str) -> bool:
    """Whether a module is a layer that has a tensor of this name, or lacks it on purpose."""
    return has(root, owner) and name in root.get_submodule(owner)._parameters if owner else name in root._parameters


def call_counts(result: Raised) -> Counter[str]:
    """Count the calls of each module."""
    return Counter(str(node.target) for node in result.graph.nodes if node.op == "call_module")

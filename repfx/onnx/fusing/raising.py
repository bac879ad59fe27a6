"""An ONNX graph as a torch.fx graph on which the rules of `fuse` run. Nothing ever runs the torch.fx graph.

Each node of the file becomes one node, or a few, in words of torch (`operators`), or one *opaque* node that says only what it reads.
Control flow and functions are opaque; the values that their subgraphs capture count as read. Values that are known before the file runs
have no node.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from repfx.onnx.file import package
from repfx.onnx.fusing.known_values import OWN_DOMAINS, FoldedValues, Node, Shapes, Value
from repfx.onnx.fusing.layers import tensor_of
from repfx.onnx.fusing.node_form import LATER, Form, Operator
from repfx.onnx.fusing.operators import read
from repfx.rewriting.view import View

_LAYERS = ("Conv", "ConvTranspose", "BatchNormalization", "Gemm")


@dataclass(frozen=True)
class Opaque:
    """The operator of a node that no rule reads, or one of its outputs. Only its name is ever used, in reasons."""

    __name__: str

    def __call__(self, *values: Any) -> Any:
        raise NotImplementedError(self.__name__)


@dataclass(frozen=True)
class Group:
    """Nodes of a file, and the nodes of the torch.fx graph that stand for them.

    Args:
        reads: by node of the torch.fx graph, its arguments that aren't constants: nodes, and the values of the file that they were.
    """

    nodes: tuple[Node, ...]
    inner: tuple[fx.Node, ...]
    reads: dict[fx.Node, list[tuple[fx.Node, Value]]]


@dataclass
class Raised:
    """A file's main graph as a torch.fx graph.

    Args:
        values: the value of the file that each node of the graph stands for.
        constants: the values of the file that are known before it runs.
        groups: which nodes stand for which, in the order of the file.
        titles: names of nodes in the file, by names and paths in the graph.
        opaque: convs, linear layers and BatchNorms that can't be read, by title, with the reason.
        inputs: tensors without numbers, like the inputs of the file whose sizes are known.
    """

    model: Any
    shapes: Shapes
    constants: FoldedValues
    root: nn.Module = field(default_factory=nn.Module)
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def view(self) -> View:
        """Return the graph as rules see it."""
        names = Counter(path for path, _ in self.root.named_modules())
        return View(self.root, self.graph, names, names, input_axes=self._axes, inputs=self.inputs, pads_apart=True)

    def _axes(self, path: str) -> int | None:
        layer: Any = self.root.get_submodule(path)
        axes: int | None = layer.axes
        return axes

    def told(self, text: str) -> str:
        """Return a sentence with the names of the file in place of those of the graph."""
        return re.sub(r"'(\w+)'", lambda found: repr(self.titles.get(found[1], found[1])), text)


def title_of(node: Node) -> str:
    """Return a node's name, or that of its first output."""
    return str(node.name or next((output.name for output in node.outputs if output.name), node.op_type))


def captured(node: Node) -> list[Value]:
    """Return the values from outside that a node's subgraphs read."""
    inside: set[Value] = set()
    read: dict[Value, None] = {}
    pending = list(graphs_of(node))
    while pending:
        graph = pending.pop()
        inside.update(graph.inputs, graph.initializers.values())
        read.update(dict.fromkeys(graph.outputs))
        for inner in graph:
            inside.update(inner.outputs)
            read.update(dict.fromkeys(value for value in inner.inputs if value is not None))
            pending += graphs_of(inner)
    return [value for value in read if value not in inside]


def graphs_of(node: Node) -> list[Any]:
    """Return the subgraphs of a node, such as the two branches of an If."""
    kinds = package("onnx_ir").AttributeType
    found: list[Any] = []
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == kinds.GRAPH:
            found.append(attribute.value)
        elif attribute.type == kinds.GRAPHS:
            found += attribute.value
    return found


def raise_file(model: Any, path: Path) -> Raised:
    """Return the main graph of a model of onnx_ir, which was read from a path, as a torch.fx graph."""
    constants = FoldedValues(model)
    return _Raiser(Raised(model, Shapes(path, constants.of_sizes(model.graph)), constants)).run()


class _Raiser:
    def __init__(self, raised: Raised) -> None:
        self._raised, self._constants = raised, raised.constants
        opsets = raised.model.graph.opset_imports
        self._opset = next((opsets[name] for name in OWN_DOMAINS if name in opsets), 1)
        self._nodes: dict[Value, fx.Node] = {}
        self._count = 0

    def run(self) -> Raised:
        raised = self._raised
        for value in raised.model.graph.inputs:
            if self._constants.of(value) is None:
                self._placeholder(value)
        for node in raised.model.graph:
            self._raise(node)
        outputs = [value for value in raised.model.graph.outputs if self._constants.of(value) is None]
        end = raised.graph.output(tuple(self._nodes[value] for value in outputs))
        raised.groups.append(Group((), (end,), {end: [(self._nodes[value], value) for value in outputs]}))
        return raised

    def _placeholder(self, value: Value) -> None:
        node = self._raised.graph.placeholder(self._free_name(value.name))
        self._nodes[value] = node
        self._raised.values[node] = value
        self._raised.titles[node.name] = value.name
        shape = self._raised.shapes.of(value)
        dtype = _DTYPES.get(getattr(value.dtype, "name", ""))
        if shape is not None and dtype is not None:
            sizes = [1 if size is None and axis != 1 else size or 0 for axis, size in enumerate(shape)]
            self._raised.inputs[str(node.target)] = torch.empty(sizes, device="meta", dtype=dtype)

    def _free_name(self, name: str) -> str:
        self._count += 1
        return f"{re.sub(r'[^a-zA-Z0-9]+', '_', name).strip('_') or 'node'}_of_{self._count}"

    def _raise(self, node: Node) -> None:
        outputs = [value for value in node.outputs if value.name]
        if outputs and all(self._constants.of(value) is not None for value in outputs):
            return
        operator = Operator(node, self._opset, self._constants, self._raised.shapes)
        form = read(operator) if node.domain in OWN_DOMAINS else None
        if form is LATER:
            return
        if not isinstance(form, Form):
            if form is not None and node.op_type in _LAYERS:
                self._raised.opaque[title_of(node)] = form
            self._opaque(node)
            return
        group = Group((*form.covers, node), (), {})
        last = self._build(form, node, group)
        self._close(group)
        self._nodes[node.outputs[0]] = last
        self._raised.values[last] = node.outputs[0]

    def _close(self, group: Group) -> None:
        self._raised.groups.append(Group(group.nodes, tuple(group.reads), group.reads))

    def _build(self, form: Form, node: Node, group: Group) -> fx.Node:
        """Add the nodes of a form to the graph. Return the last one."""
        reads: list[tuple[fx.Node, Value]] = []

        def built(argument: Any) -> Any:
            if isinstance(argument, Form):
                inner = self._build(argument, node, group)
                reads.append((inner, None))
                return inner
            if isinstance(argument, tuple):
                return tuple(map(built, argument))
            if argument in self._nodes if _is_value(argument) else False:
                reads.append((self._nodes[argument], argument))
                return self._nodes[argument]
            if _is_value(argument):  # a part of a concatenation, for example
                return self._constant(self._constants.of(argument))
            return self._constant(argument) if hasattr(argument, "dtype") else argument

        args = tuple(map(built, form.args))
        name = self._free_name(title_of(node))
        graph = self._raised.graph
        if isinstance(form.target, nn.Module):
            self._raised.root.add_module(name, form.target)
            made = graph.create_node("call_module", name, args, name=name)
        elif isinstance(form.target, str):
            made = graph.create_node("call_method", form.target, args, name=name)
        else:
            made = graph.create_node("call_function", form.target, args, name=name)
        self._raised.titles[made.name] = self._raised.titles[name] = title_of(node)
        group.reads[made] = reads
        return made

    def _constant(self, array: Any) -> fx.Node:
        name = self._free_name("constant")
        self._raised.root.register_buffer(name, tensor_of(array))
        return self._raised.graph.get_attr(name)

    def _opaque(self, node: Node) -> None:
        read = [value for value in (*node.inputs, *captured(node)) if value in self._nodes]
        name = self._free_name(title_of(node))
        args = tuple(self._nodes[value] for value in read)
        made = self._raised.graph.create_node("call_function", Opaque(node.op_type), args, name=name)
        group = Group((node,), (), {made: [(self._nodes[value], value) for value in read]})
        self._raised.titles[made.name] = title_of(node)
        for output in node.outputs:
            part = made
            if len(node.outputs) > 1:
                part = self._raised.graph.create_node("call_function", Opaque(node.op_type), (made,))
                self._raised.titles[part.name] = title_of(node)
                group.reads[part] = [(made, None)]
            self._nodes[output] = part
            self._raised.values[part] = output
        self._close(group)


def _is_value(argument: Any) -> bool:
    return isinstance(argument, package("onnx_ir").Value)


_DTYPES = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "DOUBLE": torch.float64,
}

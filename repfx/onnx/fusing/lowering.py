"""A rewritten torch.fx graph back into the ONNX graph that it came from. Nodes that no rule touched stay the objects that they were.

A value that a merged node computes keeps its name if nodes that stay read it, or if it is an output. Merged weights are new initializers
with new names, so that a name that is in both files has the same numbers in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from repfx.algebra.baking import rounded
from repfx.algebra.kernel import Kernel
from repfx.errors import InvalidInput
from repfx.onnx.file import package
from repfx.onnx.fusing.known_values import Node, Value
from repfx.onnx.fusing.raising import Group, Raised, graphs_of, title_of
from repfx.rewriting.editor import Editor


def lower(raised: Raised, editor: Editor) -> None:
    """Change the model that was raised as rules have changed its torch.fx graph.

    Raises:
        InvalidInput: a merged weight isn't finite.
    """
    _Lowering(raised, editor).run()


class _Lowering:
    def __init__(self, raised: Raised, editor: Editor) -> None:
        self._ir = package("onnx_ir")
        self._raised, self._editor = raised, editor
        self._graph = raised.model.graph
        alive = set(raised.graph.nodes)
        self._kept = [group for group in raised.groups if _is_intact(group, alive)]
        kept = {node for group in self._kept for node in group.inner}
        self._dead = [node for group in raised.groups if group not in self._kept for node in group.nodes]
        self._new = [node for node in raised.graph.nodes if node not in kept and node.op.startswith("call_")]
        self._values = {
            node: value for node, value in raised.values.items() if node in kept or node.op == "placeholder"
        }
        self._nodes = {
            str(node.target): group.nodes[0] for group in raised.groups for node in group.inner if group.nodes
        }
        self._taken = set(_names_in(self._graph))

    def run(self) -> None:
        names, anchors = self._names(), self._anchors()
        for node in self._new:
            self._emit(node, names.get(node), anchors[node])
        for group in self._kept:
            for before, after in self._changes(group):
                _rewire(group.nodes, before, after)
        for before, after in self._changes(self._kept[-1]):
            self._lead_out(before, after)
        self._remove([*self._dead, *self._strays()])
        self._graph.sort()

    def _changes(self, group: Group) -> Iterator[tuple[Value, Value]]:
        """Yield each value that a group has read, with the value that it reads now, if that is another one."""
        for node, reads in group.reads.items():
            for (_, value), now in zip(reads, arguments_of(node)):
                if value is not None and self._values[now] is not value:
                    yield value, self._values[now]

    def _names(self) -> dict[fx.Node, Value]:
        """Return the value whose place each new node takes: an output of the file if there is one."""
        gone = {output for node in self._dead for output in node.outputs}
        found: dict[fx.Node, Value] = {}
        for group in reversed(self._kept):  # the outputs of the file come last
            for node, reads in group.reads.items():
                for (_, value), now in zip(reads, arguments_of(node)):
                    if value in gone and now not in self._values:
                        found.setdefault(now, value)
        return found

    def _anchors(self) -> dict[fx.Node, Node | None]:
        """Return, for each new node, the node of the file in front of which it belongs, or None for the end."""
        first = {node: group.nodes[0] for group in self._kept for node in group.inner if group.nodes}
        anchors: dict[fx.Node, Node | None] = {}
        anchor = None
        for node in reversed(self._raised.graph.nodes):
            anchors[node] = anchor
            anchor = first.get(node, anchor)
        return anchors

    # ---- new nodes

    def _emit(self, node: fx.Node, place: Value | None, anchor: Node | None) -> None:
        if node in self._editor.merged:
            nodes = list(self._merged(node))
        else:
            nodes = [self._call(node)]
        result = nodes[-1].outputs[0]
        if place is not None:
            result.name, place.name = place.name, f"{place.name} (replaced)"
            result.type, result.shape = place.type, place.shape
            result.doc_string = place.doc_string
            result.metadata_props.update(place.metadata_props)
        for each in nodes:
            for output in each.outputs:
                output.name = output.name or self._free_name(f"{each.name}_output")
            if anchor is None:
                self._graph.append(each)
            else:
                self._graph.insert_before(anchor, each)
        self._values[node] = result

    def _merged(self, node: fx.Node) -> Iterator[Node]:
        """Yield the nodes that compute a merged kernel."""
        notes, kernel = self._editor.merged[node], self._editor.view.kernels[node]
        origin = self._nodes[notes.path]
        dtype = notes.template.weight.dtype
        x = self._values[arguments_of(node)[0]]
        if not kernel.dimensions:
            yield from self._linear(kernel, x, origin, dtype, notes.template.axes)
            return
        if any(side < 0 for pair in kernel.padding for side in pair):
            sides = [0, 0, *(before for before, _ in kernel.padding), 0, 0, *(after for _, after in kernel.padding)]
            pad = self._pad(x, sides, origin)
            x = pad.outputs[0]
            kernel = _unpadded(kernel)
            yield pad
        inputs = [x, self._tensor(kernel.weight, dtype, origin, "weight")]
        if kernel.bias is not None:
            inputs.append(self._tensor(kernel.bias, dtype, origin, "bias"))
        attributes = {
            "dilations": kernel.dilation,
            "group": kernel.groups,
            "kernel_shape": kernel.kernel_size,
            "pads": [side for sides in zip(*kernel.padding) for side in sides],
            "strides": kernel.stride,
        }
        if kernel.transposed:
            attributes["output_padding"] = kernel.output_padding
        yield self._node("ConvTranspose" if kernel.transposed else "Conv", inputs, origin, attributes)

    def _linear(self, kernel: Kernel, x: Value, origin: Node, dtype: torch.dtype, axes: int) -> Iterator[Node]:
        rows = kernel.ungroup().weight
        bias = None if kernel.bias is None else self._tensor(kernel.bias, dtype, origin, "bias")
        if axes == 2 and bias is not None:
            inputs = [x, self._tensor(rows, dtype, origin, "weight"), bias]
            yield self._node("Gemm", inputs, origin, {"transB": 1})
            return
        product = self._node("MatMul", [x, self._tensor(rows.T, dtype, origin, "weight")], origin, {})
        yield product
        if bias is not None:
            yield self._node("Add", [product.outputs[0], bias], None, {})

    def _call(self, node: fx.Node) -> Node:
        """Return the node of a sum that is left when terms have been merged, of a cropped value, or of one beside ones."""
        values = [self._values[source] for source in arguments_of(node)]
        if node.target is F.pad:
            last: Any = node.args[1]
            pairs = [last[place : place + 2] for place in range(0, len(last), 2)][::-1]
            ones = "value" in node.kwargs
            front = [(0, 0)] * (1 if ones else 2)  # batch and, unless ones go beside them, channels
            sides = [side for each in zip(*front, *pairs) for side in each]
            dtype = self._editor.merged[next(iter(node.users))].template.weight.dtype if ones else None
            return self._pad(values[0], sides, None, ones=dtype)
        assert not node.kwargs  # no sum in a file has a factor other than 1 and -1
        return self._node(_OPERATORS[node.target], values, None, {})

    def _pad(self, x: Value, sides: list[int], origin: Node | None, *, ones: torch.dtype | None = None) -> Node:
        """Return a node that pads with zeros, or with ones of a dtype."""
        if self._raised.model.graph.opset_imports[""] < 11:
            return self._node("Pad", [x], origin, {"pads": tuple(sides), "value": 0.0 if ones is None else 1.0})
        pads = self._initializer(torch.tensor(sides), self._free_name("pads"))
        filling = [] if ones is None else [self._initializer(torch.ones((), dtype=ones), self._free_name("one"))]
        return self._node("Pad", [x, pads, *filling], origin, {})

    def _node(self, operator: str, inputs: list[Value], origin: Node | None, attributes: dict[str, Any]) -> Node:
        """Return a node that takes the name, and what is noted, of the node whose weight it has merged."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in attributes.items()}
        made = self._ir.node(operator, inputs, values, name=origin.name if origin is not None else None)
        if origin is not None:
            made.doc_string = origin.doc_string
            made.metadata_props.update(origin.metadata_props)
        return made

    def _tensor(self, tensor: Tensor, dtype: torch.dtype, origin: Node, name: str) -> Value:
        """Return a new initializer, rounded once."""
        numbers = rounded(tensor.detach(), dtype).contiguous()
        if not bool(torch.isfinite(numbers).all()):
            raise InvalidInput(
                f"the merged {name} of {title_of(origin)!r} is not finite in {dtype}; look for NaN or Inf in the file."
            )
        return self._initializer(numbers, self._free_name(f"{title_of(origin)}_fused_{name}"))

    def _initializer(self, tensor: Tensor, name: str) -> Value:
        adapted = package("onnx_ir.tensor_adapters").TorchTensor(tensor, name=name)
        value = self._ir.Value(
            name=name, shape=adapted.shape, type=self._ir.TensorType(adapted.dtype), const_value=adapted
        )
        self._register(value)
        return value

    def _register(self, value: Value) -> None:
        self._graph.register_initializer(value)
        if self._raised.model.ir_version < 4:  # in such a file each initializer has to be an input
            self._graph.inputs.append(value)

    def _free_name(self, name: str) -> str:
        free, number = name, 0
        while free in self._taken:
            number += 1
            free = f"{name}_{number}"
        self._taken.add(free)
        return free

    # ---- outputs, and what nothing reads any more

    def _lead_out(self, before: Value, after: Value) -> None:
        """Let an output of the file be another value, under its own name."""
        outputs = self._graph.outputs
        place = next(index for index, output in enumerate(outputs) if output is before)
        if after.name != before.name.removesuffix(" (replaced)"):
            if after.is_graph_input() or after.is_initializer() or after.is_graph_output():
                copy = self._node("Identity", [after], None, {})
                self._graph.append(copy)
                after = copy.outputs[0]
            after.name, before.name = before.name, f"{before.name} (replaced)"
            after.type, after.shape = before.type, before.shape
        outputs[place] = after

    def _strays(self) -> list[Node]:
        """Return the nodes of known values that read what is removed, to ask for its type. What is needed of them is an initializer now."""
        dead = set(self._dead)
        kept = {node for group in self._kept for node in group.nodes}
        read = {id(output): output.uses() for node in dead for output in node.outputs}
        strays = list(dict.fromkeys(use.node for uses in read.values() for use in uses if use.node not in dead))

        def needed(value: Value) -> bool:
            users = {use.node for use in value.uses()} - dead
            return bool(value.is_graph_output()) or any(
                user in kept or user.graph is not self._graph or any(map(needed, user.outputs)) for user in users
            )

        for value in [output for stray in strays for output in stray.outputs if needed(output)]:
            self._freeze(value)
        for stray in strays:  # the list grows: what reads a value that isn't needed isn't needed either
            users = (use.node for output in stray.outputs for use in output.uses())
            strays += [user for user in dict.fromkeys(users) if user not in dead and user not in strays]
        return strays

    def _freeze(self, value: Value) -> None:
        """Put an initializer in the place of a value that is known before the file runs."""
        name, value.name = value.name, f"{value.name} (replaced)"
        tensor = self._ir.tensor(self._raised.constants.of(value), name=name)
        frozen = self._ir.Value(
            name=name, shape=tensor.shape, type=self._ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._register(frozen)
        for use in list(value.uses()):
            use.node.replace_input_with(use.idx, frozen)
        for place, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[place] = frozen

    def _remove(self, nodes: Iterable[Node]) -> None:
        """Remove nodes, and then what only they have read: initializers, and nodes that compute constants."""
        pending = [*nodes]
        sources = list(dict.fromkeys(value for node in pending for value in node.inputs if value is not None))
        self._graph.remove(pending, safe=True)
        outputs = set(self._graph.outputs)
        for value in sources:
            if value.uses() or value in outputs:
                continue
            producer = value.producer()
            if producer is not None and producer.graph is self._graph:
                if not any(output.uses() or output in outputs for output in producer.outputs):
                    self._remove([producer])
            elif value.is_initializer() and value.name in self._graph.initializers:
                del self._graph.initializers[value.name]
                if value.is_graph_input():
                    self._graph.inputs.remove(value)


_OPERATORS: dict[Any, str] = {torch.add: "Add", torch.sub: "Sub", torch.neg: "Neg"}


def arguments_of(node: fx.Node) -> list[fx.Node]:
    """Return the nodes among the arguments of a node, in their order, without constants."""
    found: list[fx.Node] = []

    def note(each: fx.Node) -> fx.Node:
        found.append(each)
        return each

    fx.node.map_arg(node.args, note)
    return [each for each in found if each.op != "get_attr"]


def _is_intact(group: Group, alive: set[fx.Node]) -> bool:
    """Whether no rule has touched a group: all its nodes are there, and read one another as they did."""
    if not all(node in alive for node in group.inner):
        return False
    return all(
        now is before
        for node, reads in group.reads.items()
        for (before, value), now in zip(reads, arguments_of(node))
        if value is None
    )


def _unpadded(kernel: Kernel) -> Kernel:
    return replace(kernel, padding=((0, 0),) * kernel.dimensions)


def _rewire(nodes: Iterable[Node], before: Value, after: Value) -> None:
    """Let nodes, and the subgraphs in them, read another value."""
    for node in nodes:
        for place, value in enumerate(node.inputs):
            if value is before:
                node.replace_input_with(place, after)
        for graph in graphs_of(node):
            for place, value in enumerate(graph.outputs):
                if value is before:
                    graph.outputs[place] = after
            _rewire(graph, before, after)


def _names_in(graph: Any) -> Iterator[str]:
    yield from (value.name for value in (*graph.inputs, *graph.initializers.values()))
    for node in graph:
        yield from (output.name for output in node.outputs)
        for inner in graphs_of(node):
            yield from _names_in(inner)

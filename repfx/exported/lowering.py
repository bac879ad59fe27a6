"""`lowered`: a graph that rules have rewritten as a graph of ATen operators again.

A node that no rule has touched gets back the operator, the arguments and the notes that it had. A conv that rules have made becomes a call
of an operator with tensors of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher

from repfx.errors import InvalidInput
from repfx.exported.nodes import flat_inputs
from repfx.exported.operators import conv_call, name_of
from repfx.exported.raising import Raised
from repfx.exported.source import Source
from repfx.graphs.checks import with_axes
from repfx.records.module_tree import called_by
from repfx.records.provenance import provenance_of

NOTE = "repfx"  # the key of the notes on a merged conv, in `meta["custom"]`
_ATEN = torch.ops.aten
_DECOMPOSED = {"convolution.default", "addmm.default", "mm.default"}


@dataclass
class Lowered:
    """A lowered graph. Tensors that rules have made are attributes in it, whose targets are given later.

    Args:
        tensors: the node and the value of each tensor that rules have made, with the name of the conv and what it is of that conv.
        names: the names that nodes should get.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    tensors: dict[fx.Node, NewTensor] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NewTensor:
    """A tensor that rules have made.

    Args:
        value: the tensor.
        kind: ``weight`` or ``bias``.
        conv: path of the conv that has it.
        was: name of the tensor that the conv had in its place, if it had one.
    """

    value: nn.Parameter
    kind: str
    conv: str
    was: str | None


def lowered(source: Source, result: Raised, convs: Mapping[fx.Node, fx.Node | None]) -> Lowered:
    """Return the graph of ATen operators that a rewritten graph means.

    Args:
        source: what was raised.
        result: the raised graph, which rules have rewritten.
        convs: the calls of convs that rules have made, each with the node of the source whose place it takes.
    """
    return _Lowering(source, result, convs).run()


class _Lowering:
    def __init__(self, source: Source, result: Raised, convs: Mapping[fx.Node, fx.Node | None]) -> None:
        self._source, self._result, self._convs = source, result, convs
        self._lowered = Lowered()
        self._graph = self._lowered.graph
        self._known: dict[fx.Node, fx.Node] = {}  # nodes of the source, copied
        self._made: dict[fx.Node, Any] = {}  # raised nodes, lowered
        self._changed: set[fx.Node] = set()  # lowered nodes whose tensor may lie in memory in another way than before
        self._decomposed = any(name_of(node) in _DECOMPOSED for node in source.graph.nodes)
        self._fake_mode = next((m for node in source.graph.nodes if (m := _fake_mode_of(node)) is not None), None)

    def run(self) -> Lowered:
        for node in self._source.graph.nodes:
            if node.op == "placeholder" or (node.op == "get_attr" and not node.users):
                self._copied(node, {})
        for node in self._result.graph.nodes:
            self._made[node] = self._lower(node)
        self._name_outputs()
        return self._lowered

    def _lower(self, node: fx.Node) -> Any:
        if node in self._convs:
            return self._conv(node)
        origin = self._result.origins.get(node)
        if origin is None:
            return self._by_rules(node)
        if node.op == "get_attr":
            return None  # it is copied where it is read
        inputs = list(zip(self._result.inputs[node], flat_inputs(node), strict=True))
        self._changed.update(self._made[new] for old, new in inputs if old is not new)
        return self._copied(origin, {old: self._made[new] for old, new in inputs})

    def _copied(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> fx.Node:
        """Copy a node of the source, and what it is computed from as far as that isn't there yet.

        Args:
            values: what raised nodes that the node read have become.
        """

        def value_of(each: fx.Node) -> Any:
            value = values.get(self._result.raised.get(each))  # type: ignore[arg-type]
            return self._copied(each, values) if value is None else value

        if node not in self._known:
            made = self._graph.node_copy(node, value_of)
            self._lowered.names[made] = node.name
            self._known[node] = made
            if any(each in self._changed for each in made.all_input_nodes):
                self._compute_again(made)
        return self._known[node]

    def _compute_again(self, node: fx.Node) -> None:
        """Note how the tensor of a node lies in memory behind what rules have made. A view that this memory doesn't allow is of a copy."""
        before = node.meta.get("val")
        if name_of(node).startswith("as_strided"):
            raise InvalidInput(
                f"{node.name!r} reads memory by strides, which a merge in front of it may change: fuse the module before it is exported."
            )
        if name_of(node) == "view.default" and self._value_of(node) is None:
            with self._graph.inserting_before(node):
                contiguous = {"memory_format": torch.contiguous_format}
                node.update_arg(0, self.call(_ATEN.clone.default, node.args[0], **contiguous))
        after = self._value_of(node)
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            self._changed.add(node)
        elif str(before.stride()) != str(after.stride()) and str(before.shape) == str(after.shape):
            node.meta["val"] = after
            self._changed.add(node)

    def _value_of(self, node: fx.Node) -> Any:
        """Return what a call computes for inputs without numbers, or None if that isn't known or fails.

        Torch's Python dispatcher is on. Without it, an operator that torch composes of others in C++ fixes free sizes to the example's.
        """
        inputs = flat_inputs(node)
        known = all("val" in each.meta for each in inputs)
        if self._fake_mode is None or node.op != "call_function" or not known:
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
        try:
            with self._fake_mode, enable_python_dispatcher(), torch.no_grad():
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # sizes that depend on numbers, or a view that isn't possible
            return None

    # ---- what rules have made

    def _by_rules(self, node: fx.Node) -> fx.Node:
        args = fx.node.map_arg(node.args, self._made.__getitem__)
        return _FUNCTIONS[node.target](self, *args, **node.kwargs)

    def _conv(self, node: fx.Node) -> fx.Node:
        conv: Any = called_by(self._result.root, node)
        template = self._convs[node]
        x = self._made[node.args[0]]  # type: ignore[index]
        weight = self._tensor(node, conv, "weight")
        bias = None if conv.bias is None else self._tensor(node, conv, "bias")
        made = (
            self._linear(x, weight, bias) if isinstance(conv, nn.Linear) else self._convolution(x, weight, bias, conv)
        )
        made.meta.update(_notes(template, conv))
        self._lowered.names[made] = made.name if template is None else template.name
        return made

    def _tensor(self, node: fx.Node, conv: Any, kind: str) -> fx.Node:
        path, value = str(node.target), getattr(conv, kind)
        made = self._graph.create_node("get_attr", path, name=f"{path}.{kind}".replace(".", "_"))
        if self._fake_mode is not None:
            made.meta["val"] = self._fake_mode.from_tensor(value, static_shapes=True)
        self._lowered.tensors[made] = NewTensor(value, kind, path, self._replaced(self._convs[node], kind))
        return made

    def _replaced(self, template: fx.Node | None, kind: str) -> str | None:
        """Return the name of the weight or bias that a conv of the source has, or None."""
        call = None if template is None else conv_call(template)
        node = None if call is None else getattr(call, kind)
        while (
            isinstance(node, fx.Node)
            and kind == "weight"
            and call is not None
            and call.turned
            and node not in self._source.names
        ):
            node = node.args[0]
        return self._source.names.get(node) if isinstance(node, fx.Node) else None

    def _linear(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        value = x.meta.get("val")
        if not self._decomposed or not isinstance(value, Tensor) or value.ndim != 2:
            return self.call(_ATEN.linear.default, x, weight, *([] if bias is None else [bias]))
        turned = self.call(_ATEN.permute.default, weight, [1, 0])
        return (
            self.call(_ATEN.mm.default, x, turned) if bias is None else self.call(_ATEN.addmm.default, bias, x, turned)
        )

    def _convolution(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None, conv: Any) -> fx.Node:
        dimensions, padding = len(conv.kernel_size), conv.padding
        if conv.padding_mode != "zeros":
            sides = list(conv._reversed_padding_repeated_twice)
            x, padding = self.pad(x, sides, conv.padding_mode), (0,) * dimensions
        sizes = [list(size) if isinstance(size, tuple) else size for size in (conv.stride, padding, conv.dilation)]
        more = list(conv.output_padding)
        if self._decomposed and not isinstance(padding, str):
            return self.call(_ATEN.convolution.default, x, weight, bias, *sizes, conv.transposed, more, conv.groups)
        if conv.transposed:
            target = [_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input][
                dimensions - 1
            ]
            return self.call(target, x, weight, bias, *sizes[:2], more, conv.groups, sizes[2])
        operator = [_ATEN.conv1d, _ATEN.conv2d, _ATEN.conv3d][dimensions - 1]
        target = operator.padding if isinstance(padding, str) else operator.default
        return self.call(target, x, weight, bias, *sizes, conv.groups)

    def pad(self, x: fx.Node, sides: Any, mode: str = "constant", value: float = 0.0) -> fx.Node:
        """Return a call that pads, in the operators that the program has."""
        sides = list(sides)
        if not self._decomposed or mode == "circular":
            more: list[Any] = [mode, value] if value else [] if mode == "constant" else [mode]
            return self.call(_ATEN.pad.default, x, sides, *more)
        if mode == "constant":
            return self.call(_ATEN.constant_pad_nd.default, x, sides, value)
        kind = {"reflect": "reflection_pad", "replicate": "replication_pad"}[mode]
        return self.call(getattr(_ATEN, f"{kind}{len(sides) // 2}d").default, x, sides)

    def with_axes(self, x: fx.Node, axes: int) -> fx.Node:
        """Return x with so many axes at least."""
        for _ in range(axes - x.meta["val"].ndim):
            x = self.call(_ATEN.unsqueeze.default, x, 0)
        return x

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Return a call of an operator with the notes that its inputs allow."""
        made = self._graph.call_function(target, args, kwargs)
        value = self._value_of(made)
        if value is not None:
            made.meta["val"] = value
        made.meta.update(_place_of(made.all_input_nodes[0].meta))
        self._changed.add(made)
        return made

    def _name_outputs(self) -> None:
        """Give what the program returns the names that it had."""
        before = next(node for node in reversed(self._source.graph.nodes) if node.op == "output")
        after = next(node for node in reversed(self._graph.nodes) if node.op == "output")
        for old, new in zip(flat_inputs(before), flat_inputs(after), strict=True):
            if new.op != "placeholder" and new not in self._known.values():
                self._lowered.names[new] = old.name


def _plus(target: Any) -> Callable[..., fx.Node]:
    return lambda lowering, *args, **kwargs: lowering.call(target, *args, **kwargs)


# functions that rules and the editor write into graphs
_FUNCTIONS: dict[Any, Callable[..., fx.Node]] = {
    torch.add: _plus(_ATEN.add.Tensor),
    torch.sub: _plus(_ATEN.sub.Tensor),
    torch.mul: _plus(_ATEN.mul.Tensor),
    torch.neg: _plus(_ATEN.neg.default),
    F.pad: _Lowering.pad,
    with_axes: _Lowering.with_axes,
}

_PLACES = ("nn_module_stack", "stack_trace", "torch_fn", "source_fn_stack", "from_node")


def _place_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a node's notes that say which code made it."""
    return {name: meta[name] for name in _PLACES if name in meta}


def _notes(template: fx.Node | None, conv: nn.Module) -> dict[str, Any]:
    """Return the notes on a merged conv: the code whose place it takes, and what it was made from."""
    meta: dict[str, Any] = {} if template is None else _place_of(template.meta)
    origin = provenance_of(conv)
    if origin is not None:
        custom = dict(template.meta.get("custom", {})) if template is not None else {}
        custom[NOTE] = {"rules": list(origin.rules), "sources": list(origin.sources)}
        meta["custom"] = custom
    return meta


def _fake_mode_of(node: fx.Node) -> Any:
    return getattr(node.meta.get("val"), "fake_mode", None)

"""`Source`: a graph of ATen operators with the tensors that it reads, be it a program of `torch.export` or a plain graph module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from repfx.errors import InvalidInput
from repfx.exported.operators import tensors_written
from repfx.records.module_tree import attribute

_HELD = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
_CHANGED = {OutputKind.BUFFER_MUTATION, getattr(OutputKind, "PARAMETER_MUTATION", None)}


@dataclass(frozen=True)
class Source:
    """A graph of ATen operators, and what it reads besides its inputs.

    Args:
        graph: the graph. A program's parameters are inputs of it, those of a graph module are attributes.
        root: the module that holds what nodes call or read by a path, such as the branches of `torch.cond`.
        names: nodes that stand for a tensor of the program, each with the tensor's name.
        tensors: the tensors by name.
        changing: those of these nodes whose tensor the program changes.
    """

    graph: fx.Graph
    root: nn.Module
    names: dict[fx.Node, str]
    tensors: dict[str, Tensor]
    changing: frozenset[fx.Node]

    @classmethod
    def of_program(cls, program: ExportedProgram) -> Source:
        """Return the graph of a program. Nothing is copied."""
        if program.dialect not in ("TRAINING", "ATEN", ""):
            raise InvalidInput(
                f"the program is in the dialect {program.dialect}, whose operators aren't ATen's: fuse it before it is lowered."
            )
        signature = program.graph_signature
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        held = {
            node: str(spec.target)
            for node, spec in zip(placeholders, signature.input_specs, strict=True)
            if spec.kind in _HELD
        }
        every = {**program.constants, **program.state_dict}
        tensors = {name: every[name] for name in held.values() if isinstance(every.get(name), Tensor)}
        names = {node: name for node, name in held.items() if name in tensors}
        changed = {spec.target for spec in signature.output_specs if spec.kind in _CHANGED}
        changing = {node for node, name in names.items() if name in changed}
        return cls(program.graph, program.graph_module, names, tensors, _changing(program.graph, names) | changing)

    @classmethod
    def of_module(cls, module: fx.GraphModule) -> Source:
        """Return the graph of a graph module. Nothing is copied."""
        names = {
            node: str(node.target)
            for node in module.graph.nodes
            if node.op == "get_attr" and isinstance(attribute(module, str(node.target)), Tensor)
        }
        tensors = {name: attribute(module, name) for name in names.values()}
        changing = _changing(module.graph, names)
        changed = {names[node] for node in changing}
        return cls(module.graph, module, names, tensors, frozenset(n for n, name in names.items() if name in changed))


def _changing(graph: fx.Graph, names: dict[fx.Node, str]) -> frozenset[fx.Node]:
    """Return the nodes of tensors into which the graph may write, directly or through a view."""
    written = {base for node in graph.nodes for tensor in tensors_written(node) for base in _bases(tensor)}
    return frozenset(written & names.keys())


def _bases(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node and all nodes whose memory it may share."""
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            yield node
            pending += node.all_input_nodes if _may_be_a_view(node) else []


def _may_be_a_view(node: fx.Node) -> bool:
    """Whether a call may return a tensor that shares memory with one of its arguments."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or "dropout" in str(
        target
    ):  # dropout hands on what it doesn't drop
        return True
    returned = target._schema.returns
    return not returned or any(each.alias_info is not None for each in returned)

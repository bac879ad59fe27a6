"""Answers about nodes of a program: shapes, outputs, stacks, and which nodes are for nothing."""

from __future__ import annotations

import operator

from torch import Tensor, fx

from repfx.exported.operators import arguments_of, name_of, tensors_written


def flat_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the nodes among the arguments of a node, in their order, with repetitions."""
    found: list[fx.Node] = []

    def note(each: fx.Node) -> fx.Node:
        found.append(each)
        return each

    fx.node.map_arg((node.args, node.kwargs), note)
    return found


def shape_of(node: fx.Node) -> tuple[int | None, ...] | None:
    """Return the shape of a node's tensor. A free size is as in the example, or None if it depends on numbers. None if nothing is known."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return tuple(size if isinstance(size, int) else getattr(size.node, "hint", None) for size in value.shape)


def first_output(node: fx.Node) -> fx.Node | None:
    """Return the node that reads the first of several outputs, or None if another output is read."""
    users = list(node.users)
    firsts = [user for user in users if user.args[1:] == (0,)]
    return firsts[0] if firsts and all(user in firsts or not user.users for user in users) else None


def twins_of(output: fx.Node) -> list[fx.Node]:
    """Return the other nodes that read an output of the same call."""
    return [user for user in output.all_input_nodes[0].users if user is not output]


def stacked(node: fx.Node) -> tuple[list[fx.Node], int] | None:
    """Return the tensors and the axis of a stack that is written as a view of a concatenation, or None."""
    cat = node.args[0] if node.args else None
    if name_of(node) != "view.default" or not isinstance(cat, fx.Node) or name_of(cat) != "cat.default":
        return None
    call = arguments_of(cat)
    shapes = [_sizes_of(part) for part in call["tensors"]]
    first, whole, axis = shapes[0], _sizes_of(node), call["dim"]
    if first is None or whole is None or any(shape != first for shape in shapes) or axis < 0:
        return None
    return (list(call["tensors"]), axis) if whole == [*first[:axis], str(len(shapes)), *first[axis:]] else None


def unused_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that only compute values which nothing uses."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        computes = name_of(node) and node.target._schema.returns
        reads = node.op == "call_function" and node.target is operator.getitem
        alone = all(user in found for user in node.users) and not tensors_written(node)
        if (computes or reads) and alone and not node.is_impure():
            found.add(node)
    return found


def _sizes_of(node: fx.Node) -> list[str] | None:
    """Return the sizes of a node's tensor as texts, in which free sizes have names. None if they aren't known."""
    value = node.meta.get("val")
    return [str(size) for size in value.shape] if isinstance(value, Tensor) else None

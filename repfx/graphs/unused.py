"""Nodes that nothing uses and that do nothing else: questions about sizes, views, and arithmetic on sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import fx

from repfx.graphs.vocabulary import CONCATENATIONS, SIZE_METHODS

_FUNCTIONS = {
    getattr,
    *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod),
    *CONCATENATIONS,
    torch.broadcast_to,
    F.pad,
}
_METHODS = {*SIZE_METHODS, "expand", "repeat", "view", "reshape", "broadcast_to"}


def only_gives_a_value(node: fx.Node) -> bool:
    """Whether a node asks for a size, gives a view or calculates with sizes, and does nothing else."""
    if node.op == "call_method":
        return node.target in _METHODS
    return node.op == "call_function" and node.target in _FUNCTIONS and "out" not in node.kwargs


def erase_unused(
    graph: fx.Graph, nodes: Iterable[fx.Node], may_go: Callable[[fx.Node], bool] = only_gives_a_value
) -> None:
    """Erase those of the nodes that nothing uses and that may go, and then the nodes that only they used."""
    pending = [*nodes]
    while pending:
        node = pending.pop()
        if node._erased or node.users or not may_go(node):
            continue
        pending += node.all_input_nodes
        graph.erase_node(node)

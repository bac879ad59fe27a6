"""Calls that take the mode as an argument: a trace would fix it, so calls of modules, which have a mode, replace them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import fx, nn

from repfx.graphs.free_names import free_names


@dataclass(frozen=True)
class ModuleCall:
    """The call of a module that does, in its mode, what another call does in the mode of its argument."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# from a node, and whether its graph is that of training mode, to the call that can replace it; None if the node takes no mode, or another
Reader: TypeAlias = Callable[[fx.Node, bool], "ModuleCall | None"]


def let_follow_the_mode(
    training: fx.Graph, evaluation: fx.Graph, read: Reader, stem: str, taken: set[str]
) -> dict[str, nn.Module]:
    """Replace each call that is made in both modes, and takes the mode, by the call of a module, in the graphs of both modes.

    Return the modules by name: `stem` with a number. No name is among `taken`.
    """
    made: dict[str, nn.Module] = {}
    names = free_names(stem, taken)
    for nodes in list(zip(training.nodes, evaluation.nodes)):
        calls = [read(node, mode) for node, mode in zip(nodes, (True, False))]
        if calls[0] is None or calls[1] is None or repr(calls[0].module) != repr(calls[1].module):
            continue
        name = next(names)
        made[name] = calls[0].module
        _replace(nodes[0], name, calls[0])
        _replace(nodes[1], name, calls[1])
    return made


def _replace(node: fx.Node, name: str, call: ModuleCall) -> None:
    with node.graph.inserting_before(node):
        new = node.graph.call_module(name, call.args, call.kwargs)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)

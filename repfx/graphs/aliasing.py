"""Memory in a graph: which tensors its nodes write into, which they may share, and which they only ask for a shape."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from repfx.algebra.layers import is_batch_norm, is_conv_or_linear
from repfx.graphs.checks import require_given, require_tensor
from repfx.graphs.vocabulary import ARITHMETIC, SIZE_METHODS
from repfx.reading.source_code import writes_in_place
from repfx.records.module_tree import called_by

IN_PLACE_OPERATORS = (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "imatmul",
    "iand",
    "ior",
    "ixor",
    "ilshift",
    "irshift",
)
_IN_PLACE = {operator.setitem, *(getattr(operator, name) for name in IN_PLACE_OPERATORS)}

# functions that always return a new tensor
_NEW = frozenset(
    {F.pad, F.linear, torch.cat, torch.stack, torch.matmul}
    | {getattr(torch, f"{kind}{n}d") for kind in ("conv", "conv_transpose") for n in (1, 2, 3)}
)


def mutated_by(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """Return the node whose tensor `node` changes in place, or None."""
    if isinstance(node.target, torch._ops.OpOverload):
        return next(iter(written_by_schema(node)), None)
    given = node.args[0] if node.args else node.kwargs.get("input")
    first = given if isinstance(given, fx.Node) else None
    if node.op == "call_module":
        return first if any(map(_works_in_place, called_by(root, node).modules())) else None
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    if node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
        return first
    in_place = (
        node.target in _IN_PLACE
        or node.kwargs.get("inplace") is True
        or str(getattr(node.target, "__name__", "")).endswith("_")
    )
    return first if node.op == "call_function" and in_place else None


def written_by_schema(node: fx.Node) -> list[fx.Node]:
    """Return the nodes into whose tensors an operator of torch writes, as its schema says; none for other nodes.

    >>> graph = fx.Graph()
    >>> written_by_schema(graph.call_function(torch.ops.aten.relu_.default, (graph.placeholder("x"),)))
    [x]
    """
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is torch.ops.aten.detach_.default:
        return []  # `detach_` changes no number
    arguments = node.target._schema.arguments
    given = {**{argument.name: value for argument, value in zip(arguments, node.args)}, **node.kwargs}
    marked = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write and a.name in given]
    found: list[fx.Node] = []
    fx.node.map_arg([given[name] for name in marked], found.append)
    return found


def _works_in_place(layer: nn.Module) -> bool:
    if hasattr(layer, "inplace"):
        return bool(layer.inplace)
    return not type(layer).__module__.startswith("torch.") and writes_in_place(type(layer))  # type: ignore[arg-type]


def has_code_of_others(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node calls a module with code that is not torch's. Such code may change tensors that the module holds."""
    layers = called_by(root, node).modules()
    return any(not type(layer).__module__.startswith("torch.") for layer in layers)


def may_share_memory(node: fx.Node, root: nn.Module) -> set[fx.Node]:
    """The nodes whose memory `node` may share, itself included; only itself if it certainly makes a new tensor."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [] if _makes_new_tensor(node, root) else node.all_input_nodes
    return found


def _makes_new_tensor(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        module = called_by(root, node)
        return is_conv_or_linear(module) or is_batch_norm(module)
    return node.target in _NEW or (node.target in ARITHMETIC and mutated_by(node, root) is None)


def reads_only_the_form(node: fx.Node) -> bool:
    """Whether a node asks only for the shape, dtype, device or class of a tensor, not for a number in it."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    if node.op == "call_function" and node.target in (require_tensor, require_given):
        return True
    return node.op == "call_method" and node.target in SIZE_METHODS

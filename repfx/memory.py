"""Which tensors the nodes of a graph write into, share, or only ask for their shape."""

from __future__ import annotations

import operator

from torch import fx, nn

from repfx.arithmetic import ARITHMETIC
from repfx.meaning import is_batch_norm, is_conv

_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}


def mutated_by(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The node whose tensor this one changes in place, if it does."""
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if node.op == "call_module":
        layers = root.get_submodule(str(node.target)).modules()
        return first if any(getattr(layer, "inplace", False) for layer in layers) else None
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


def may_share_memory(node: fx.Node, root: nn.Module) -> set[fx.Node]:
    """The nodes whose tensors `node` may be, whole or in part: itself alone where it surely makes a tensor of its own."""
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
        module = root.get_submodule(str(node.target))
        return is_conv(module) or is_batch_norm(module) or isinstance(module, nn.Linear)
    return node.target in ARITHMETIC and mutated_by(node, root) is None


def reads_only_the_form(node: fx.Node) -> bool:
    """Whether a node asks a tensor for its shape, dtype or device and for no number in it."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_method" and node.target in ("size", "dim", "numel", "ndimension", "nelement")

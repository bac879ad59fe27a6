"""BatchNorms that also drop and activate, such as timm's `BatchNormAct2d`. Their affine part is a linear map like any BatchNorm's.

In a graph such a module becomes several calls: the norm, then its `drop` and its `act`, unless these do nothing. If a rule merges the
norm, `drop` and `act` stay at their paths. If none does, the calls become one call of the original module again.
"""

from __future__ import annotations

import copy
import importlib
from collections import OrderedDict

from torch import fx, nn

from repfx.algebra.layers import ACTIVATED_BATCH_NORMS, Layer, has_hooks, is_patched, qualified_name
from repfx.records.module_tree import called_by
from repfx.records.notes import keep, kept

_PARTS = ("drop", "act")
_WHOLE = "repfx_whole_class"
_BEFORE = "repfx_class_before"


def is_activated(module: nn.Module) -> bool:
    """Whether `module` runs a BatchNorm, then its `drop` and its `act`, and no other code."""
    return qualified_name(module) in ACTIVATED_BATCH_NORMS and not has_hooks(module) and not is_patched(module)


def norm_of(module: Layer) -> Layer:
    """Return the norm alone, with the same parameters and buffers. A BatchNorm that does nothing else is returned itself."""
    if not is_activated(module):
        return module
    norm = copy.copy(module)
    vars(norm).update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    for name in _PARTS:
        norm._modules.pop(name, None)
    norm.__class__ = _norm_class(module)
    keep(norm, _BEFORE, type(module))
    return norm


def rest_of(module: nn.Module) -> nn.Module:
    """Return the part of a BatchNorm behind the norm: its drop and activation under their names, or the identity."""
    if not is_activated(module):
        return nn.Identity().train(module.training)
    parts = OrderedDict((name, getattr(module, name)) for name in _PARTS if hasattr(module, name))
    rest = nn.Sequential(parts)
    rest.training = module.training
    return rest


def joined(norm: nn.Module, rest: nn.Module) -> nn.Module:
    """Join a norm and a module that `rest_of` returned. If both come from one module, the result is of that module's class."""
    parts = OrderedDict(rest.named_children()) if is_rest(rest) else OrderedDict()
    before = kept(norm, _BEFORE)
    if isinstance(before, type):
        for name, part in parts.items():
            norm.add_module(name, part)
        norm.__class__ = before
        delattr(norm, _BEFORE)
        return norm
    return nn.Sequential(OrderedDict(norm=norm, **parts)).train(norm.training) if parts else norm


def is_rest(module: nn.Module) -> bool:
    """Whether `module` consists only of the drop and the activation of a BatchNorm."""
    names = {name for name, _ in module.named_children()}
    return type(module) in (nn.Module, nn.Sequential) and bool(names) and names <= set(_PARTS)


def _norm_class(module: nn.Module) -> type[nn.Module]:
    path, _, name = ACTIVATED_BATCH_NORMS[qualified_name(module)].rpartition(".")
    found: type[nn.Module] = getattr(importlib.import_module(path), name)
    return found


# ---- in graphs


def separate(graph: fx.Graph, root: nn.Module) -> None:
    """Make a graph call the norm, the drop and the activation one after another. This is right once `bare` has changed the modules."""
    for node, module in _calls(graph, root):
        if not is_activated(module):
            continue
        last = node
        for name in _working_parts(module):
            with graph.inserting_after(last):
                part = graph.call_module(f"{node.target}.{name}", (last,))
            last.replace_all_uses_with(part)
            part.args = (last,)
            last = part


def bare(root: nn.Module, graph: fx.Graph) -> None:
    """Turn the modules of a separated graph into norms alone. Their drop and activation stay their children."""
    for _, module in _calls(graph, root):
        if is_activated(module):
            keep(module, _WHOLE, type(module))
            module.__class__ = _norm_class(module)


def join(root: nn.Module, graph: fx.Graph) -> None:
    """Undo `separate` and `bare` for each norm that the graph still calls: its calls become one call of one module again."""
    separated = [(node, module) for node, module in _calls(graph, root) if kept(module, _WHOLE) is not None]
    for node, module in separated:
        for name in _working_parts(module):
            (part,) = node.users
            assert part.target == f"{node.target}.{name}"
            part.replace_all_uses_with(node)
            graph.erase_node(part)
    for module in dict.fromkeys(module for _, module in separated):
        module.__class__ = kept(module, _WHOLE)  # type: ignore[assignment]
        delattr(module, _WHOLE)


def is_separated(module: nn.Module | None) -> bool:
    """Whether `module` is a norm that `bare` made from a module whose drop or activation does something."""
    return module is not None and kept(module, _WHOLE) is not None and bool(_working_parts(module))


def _calls(graph: fx.Graph, root: nn.Module) -> list[tuple[fx.Node, nn.Module]]:
    """Return the nodes that call a module, each with its module."""
    return [(node, called_by(root, node)) for node in graph.nodes if node.op == "call_module"]


def _working_parts(module: nn.Module) -> list[str]:
    return [name for name in _PARTS if type(getattr(module, name, nn.Identity())) is not nn.Identity]

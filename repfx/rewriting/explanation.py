"""Reasons why convs and BatchNorms stay: the rule that came nearest, what stands in the way, or that there is no rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx, nn

from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.algebra.meaning import drop_rate
from repfx.graphs.functional_conv import is_functional_conv, read_functional_conv
from repfx.records.report import Skip
from repfx.rewriting.editor import Editor
from repfx.rewriting.view import View
from repfx.tracing.trace import Traces

UNTRACED = "what calls it can't be traced"
NearMisses = Mapping[fx.Node, list[Skip]]


def left_alone(editor: Editor, near_misses: NearMisses) -> list[Skip]:
    """Return a skip for each thing that users may have expected to go: BatchNorms, layers that can't be read, near misses of a rule."""
    skips = []
    for node in editor.view.graph.nodes:
        path = _path(node, editor)
        misses = near_misses.get(node, [])
        skips += [Skip(path, miss.reason, miss.rule) for miss in misses]
        if node in editor.merged or not _is_layer(node, editor.view):
            continue
        reason = editor.view.refusal(node)
        if reason is not None:
            skips.append(Skip(path, reason))
        elif not misses and not _is_plain_conv(node, editor.view):
            skips.append(Skip(path, _no_rule(node, editor.view)))
    return skips


def all_that_stays(editor: Editor, near_misses: NearMisses) -> list[Skip]:
    """Return a skip for every conv and BatchNorm that is in the graph now, with the reason."""
    return [
        Skip(_path(node, editor), _reason(node, editor, near_misses))
        for node in editor.view.graph.nodes
        if node in editor.merged or _is_layer(node, editor.view)
    ]


def left_outside(model: nn.Module, traces: Traces) -> Iterator[Skip]:
    """Yield a skip for each conv and BatchNorm of a model that no graph calls."""
    called = {
        island.full_path(str(node.target))
        for island in traces.islands
        for node in island.graph.nodes
        if node.op == "call_module"
    }
    for path, module in model.named_modules():
        if (is_batch_norm(module) or is_conv(module)) and path not in called:
            inside = any(not code or f"{path}.".startswith(f"{code}.") for code in traces.untraced)
            yield Skip(path, UNTRACED if inside else "nothing calls it", "trace")


def _reason(node: fx.Node, editor: Editor, near_misses: NearMisses) -> str:
    view = editor.view
    refusal = view.refusal(node)
    if refusal is not None:
        return refusal
    if editor.island.path and all(
        near.op in ("placeholder", "output") for near in (*node.all_input_nodes, *node.users)
    ):
        return UNTRACED
    misses = [miss for near in (node, *node.users) for miss in near_misses.get(near, [])]
    return f"{misses[0].reason} ({misses[0].rule})" if misses else _no_rule(node, view)


def _no_rule(node: fx.Node, view: View) -> str:
    """Return why no rule applies to a node: what comes before or after it, or why a functional conv isn't read."""
    unread = read_functional_conv(node, view.constants)
    if unread is not None:
        return unread if isinstance(unread, str) else "no rule: its weight is computed in forward"
    if not _is_plain_conv(node, view):
        drop = _drop_in_sum(node.all_input_nodes[0], view)
        if drop is not None:
            return f"no rule: {drop.name!r} drops a term of the sum before it while the model trains, so the sum is no conv"
        return f"no rule: {_name(node.all_input_nodes[0], view)} comes before it"
    users = list(node.users)
    names = " and ".join(dict.fromkeys(_name(user, view) for user in users))
    return f"no rule: {names} {'follows' if len(users) == 1 else 'follow'}" if users else "no rule: nothing uses it"


def _drop_in_sum(node: fx.Node, view: View) -> fx.Node | None:
    """Return a term of a sum that a layer drops in training mode, or None."""
    found = view.sum_of(node)
    for _, term in () if found is None else found.terms:
        module = view.module(term)
        dropped = module is not None and drop_rate(module) is not None
        drop = term if dropped else _drop_in_sum(term, view) if len(term.users) == 1 else None
        if drop is not None:
            return drop
    return None


def _name(node: fx.Node, view: View) -> str:
    """Name a node by the class of its module, by its function, or as the input or output."""
    if node.op in ("placeholder", "output"):
        return {"placeholder": "the input", "output": "the output"}[node.op]
    module = view.module(node)
    if module is not None:
        return type(module).__name__
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _is_layer(node: fx.Node, view: View) -> bool:
    module = view.module(node)
    return is_functional_conv(node) or (module is not None and (is_batch_norm(module) or is_conv(module)))


def _is_plain_conv(node: fx.Node, view: View) -> bool:
    module = view.module(node)
    return module is not None and not is_batch_norm(module) and view.is_conv(node)


def _path(node: fx.Node, editor: Editor) -> str:
    """Return the path in the model of the module that a node calls, or else the node's name."""
    return editor.island.full_path(str(node.target) if node.op == "call_module" else node.name)

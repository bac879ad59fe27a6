"""The conditions of rules. Each guard asks one question about a match and returns the reason against the match, or None."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import pairwise

import torch
from torch import fx, nn

from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.cost import Shape, weights
from repfx.algebra.kernel import Kernel, NoKernel, is_symmetric
from repfx.algebra.layers import has_tensors
from repfx.graphs.aliasing import may_share_memory, mutated_by, reads_only_the_form
from repfx.graphs.calls_with_tensors import is_norm_call
from repfx.graphs.channel_slices import takes_a_batch
from repfx.graphs.functional_conv import is_shared
from repfx.graphs.vocabulary import ARITHMETIC, ELEMENTWISE_LAYERS
from repfx.rewriting.match import Match, cost_of_convs, shape_before
from repfx.rewriting.view import META, View


def used_once(match: Match, view: View) -> str | None:
    """Require that no other node uses what lies inside the match, except for a shape that the merged conv's output has too.

    What is only cropped from the output may be used, too.
    """
    inside = set(match.nodes)
    cropped = {node for node, _ in match.cropped}
    for node in match.nodes[1:]:
        if node in cropped:
            continue
        outside = [user for user in node.users if user not in inside and not _asks_for_the_shape(user, node, match)]
        if outside:
            return f"{node.name!r} has a second user, {outside[0].name!r}"
    return None


def _asks_for_the_shape(user: fx.Node, node: fx.Node, match: Match) -> bool:
    return node is match.ops[0].node and match.keeps_the_form and reads_only_the_form(user)


def carried_alone(match: Match, view: View) -> str | None:
    """Require that nothing else reads what lies between a conv and a BatchNorm, or changes it in place."""
    parts = (match, *match.others)
    if len({part.root for part in parts}) < len(parts):
        return f"{match.root.name!r} is read twice"
    carried = match.carried
    for part in parts:
        ends = (part.root, carried) if carried is not None and part.root < carried else (carried, part.root)
        for node, user in pairwise((ends[0], *part.carriers, ends[1])):
            others = [other for other in node.users if other is not user] if node is not None else []
            if others and node is not None:
                return f"{node.name!r} has a second user, {others[0].name!r}"
    return _changed_on_the_way(match, view)


def _changed_on_the_way(match: Match, view: View) -> str | None:
    """Refuse a match if a node writes into the input of the BatchNorm while the BatchNorm's output is on its way to the conv."""
    if match.carried is None or match.root < match.carried:
        return None  # the conv is in front, and nothing else reads its output
    memory = may_share_memory(match.carried.all_input_nodes[0], view.root)
    node = match.carried.next
    while node is not match.root:
        written = mutated_by(node, view.root)
        if written is not None and memory & may_share_memory(written, view.root):
            return f"{node.name!r} changes {written.name!r} in place between the calls that would be merged"
        node = node.next
    return None


def each_part(guard: Callable[[Match, View], str | None]) -> Callable[[Match, View], str | None]:
    """Return a guard that asks another one about all matches that are made together."""

    @wraps(guard)
    def of_all(match: Match, view: View) -> str | None:
        return next(filter(None, (guard(part, view) for part in (match, *match.others))), None)

    return of_all


def unmutated(match: Match, view: View) -> str | None:
    """Require that no node changes what the match reads before its root is reached, and that none relies on the match to do so."""
    inside = set(match.nodes)
    node = min(inside)
    while node is not match.root.next:
        written = mutated_by(node, view.root)
        if written is not None and node not in match.written:
            reason = (
                _written_inside(node, written, match, view) if node in inside else _halfway(node, written, match, view)
            )
            if reason is not None:
                return reason
        node = node.next
    return None


def _written_inside(node: fx.Node, written: fx.Node, match: Match, view: View) -> str | None:
    """Refuse a match in which a node writes into what others still read: nodes outside, or other paths of the match itself."""
    inside, memory = set(match.nodes), may_share_memory(written, view.root)
    reason = _relied_on(written, inside, view) if memory - inside else None
    return reason or _read_late(node, written, memory - {match.root})


def _read_late(node: fx.Node, written: fx.Node, memory: set[fx.Node]) -> str | None:
    """Refuse a match whose merged conv wouldn't see what `node` writes before another node reads it."""
    users = [user for held in memory for user in held.users if user > node and not reads_only_the_form(user)]
    return f"{written.name!r} is changed in place before {min(users).name!r} reads it" if users else None


def _relied_on(written: fx.Node, inside: set[fx.Node], view: View) -> str | None:
    """Refuse a match that writes into a tensor from outside, because the merged conv won't change that tensor."""
    memory = may_share_memory(written, view.root)
    for node in view.graph.nodes:
        needed = node not in inside and any(user not in inside for user in node.users)
        if needed and memory & may_share_memory(node, view.root):
            return f"{written.name!r} is changed in place and used elsewhere"
    return None


def _halfway(node: fx.Node, written: fx.Node, match: Match, view: View) -> str | None:
    """Refuse a match if another node writes into what the match reads while it is being computed."""
    memory = may_share_memory(written, view.root)
    cropped = (node for node, _ in match.cropped)
    for source in (match.source, *cropped, *(term for _, term in match.remainder)):
        if source < node and memory & may_share_memory(source, view.root):
            return f"{node.name!r} changes {source.name!r} in place between the calls that would be merged"
    return None


def handed_on_alone(match: Match, view: View) -> str | None:
    """Require that nobody counts on a tensor of its own where an input is handed on, for a layer may copy it."""
    if isinstance(view.module(match.root), nn.Identity):
        return None
    memory = may_share_memory(match.source, view.root)
    inside = {*memory, *match.nodes}
    outside = any(node.op in ("placeholder", "get_attr") or not set(node.users) <= inside for node in memory)
    node = match.root.next
    while outside and node.op != "root":
        written = mutated_by(node, view.root)
        if written is not None and may_share_memory(written, view.root) & {*memory, match.root}:
            return f"{node.name!r} changes in place what it hands on"
        node = node.next
    return None


def weight_of_its_own(match: Match, view: View) -> str | None:
    """Require that no other call reads the weight of a functional conv, or what that weight is computed from."""
    return "its weight is read elsewhere in the model" if is_shared(match.root) else None


def is_convolution(match: Match, view: View) -> str | None:
    """Require that the algebra has a kernel for the match, borders included."""
    try:
        _ = match.form
    except NoKernel as reason:
        return str(reason)
    return None


def no_dearer(match: Match, view: View) -> str | None:
    """Require that the merged conv costs no more than the convs it replaces. By default the cost is the number of weights.

    Where it replaces a single conv, weights decide whatever the cost is.
    """
    several = sum(view.is_conv(node) for node in {op.node for op in match.ops}) > 1
    cost = view.cost_of if several else _count_weights
    before = cost_of_convs(match.terms, match, cost, view)
    after = cost(match.form, shape_before(match, view))
    if after <= before:
        return None
    if several and view.cost is not weights:
        return f"the merged conv would cost {after:g}, the convs it replaces cost {before:g}"
    return f"the merged conv would have {after} weights, the convs it replaces have {before}"


def _count_weights(kernel: Kernel, shape: Shape | None) -> float:
    return weights(ConvSpec.of_kernel(kernel))


def channels_stay_put(match: Match, view: View) -> str | None:
    """Require ``(batch, channels)`` where a linear layer, which acts on the last axis, meets BatchNorm1d, which acts on the second."""
    if match.sizes()[1] != 0:
        return None
    norms = [op.node for op in match.ops if _counts_from_the_front(op.node, view)]
    if not norms or _is_flat(match.source, view) or all(view.input_axes(str(node.target)) == 2 for node in norms):
        return None
    return "the input of the linear layer isn't known to be (batch, channels), and BatchNorm1d counts its channels on the second axis"


def _counts_from_the_front(node: fx.Node, view: View) -> bool:
    """Whether a node scales and shifts along the second axis, whatever the number of axes."""
    return isinstance(view.module(node), nn.BatchNorm1d | nn.SyncBatchNorm) or is_norm_call(node, view.root)


def slices_channels(match: Match, view: View) -> str | None:
    """Refuse a match in which code may slice another axis than that of the channels, because its input has no batch.

    Where a conv reads a slice, such an input has the wrong number of channels for it.
    """
    for term in match.terms:
        for op, behind in pairwise(term.ops):
            in_channels = op.meaning.in_channels
            reads = behind.meaning.kind == "conv" and behind.node is not match.root
            if op.meaning.kind == "slice" and (
                takes_a_batch(op) or (reads and behind.meaning.in_channels != in_channels)
            ):
                return None
    sliced = next((op.node.name for op in match.ops if op.meaning.kind == "slice" and op.meaning.dimensions), None)
    return None if sliced is None else f"{sliced!r} would slice another axis of an input without a batch"


def input_is_known(match: Match, view: View) -> str | None:
    """Refuse arithmetic on the model's own input, which may hold integers, or one channel that a constant makes into several.

    An example tells what the input is.
    """
    first = match.ops[0]
    if view.module(first.node) is not None and view.code(first.node) is None:
        return None
    return _why_unknown(match.source, match, view, scaled=True)


def _why_unknown(node: fx.Node, match: Match, view: View, *, scaled: bool) -> str | None:
    """Return why a node may have other channels than the source of a match, or integers.

    Args:
        scaled: whether only scales and shifts stand between the node and the match.
    """
    if node.op == "placeholder":
        known = scaled and _is_as_given(view.inputs.get(str(node.target)), match, view)
        return None if known else "the input may hold integers, or have fewer channels than the constant"
    op = view.op(node)
    if op is not None and op.meaning.kind == "conv":
        out_channels = op.meaning.build(META, op.meaning.in_channels or 0, op.meaning.dimensions or 0).out_channels
        needed = match.sizes()[0]
        return None if out_channels == needed else f"the constant makes {out_channels} channels into {needed}"
    inputs = node.all_input_nodes
    if _is_layer(node, view) or (len(inputs) != 1 and node.target not in ARITHMETIC):
        return None
    scaled = scaled and op is not None and op.meaning.kind == "affine"
    reasons = [_why_unknown(each, match, view, scaled=scaled) for each in inputs]
    return None if None in reasons else reasons[0]  # arithmetic gives as many channels as its largest operand has


def _is_as_given(given: object, match: Match, view: View) -> bool:
    """Whether an input that was given has the channels of a match's source, and the dtype of the weights."""
    channels, dimensions = match.sizes()
    weight = next(view.root.parameters(), None)
    if weight is None or not isinstance(given, torch.Tensor) or given.ndim != dimensions + 2:
        return False
    return given.dtype == weight.dtype and given.shape[1] == channels


def _is_layer(node: fx.Node, view: View) -> bool:
    """Whether a node surely outputs fractional numbers, with as many channels as its module says."""
    module = view.module(node)
    return module is not None and has_tensors(module)


def pads_alike(match: Match, view: View) -> str | None:
    """Require that a conv can pad as the merged kernel needs. Otherwise one padding layer would only replace another."""
    padding = match.form.padding
    if is_symmetric(padding) or (view.pads_apart and all(side >= 0 for pair in padding for side in pair)):
        return None
    return "a conv pads both sides alike, this padding doesn't"


_SAME_RANK = (nn.Linear, nn.BatchNorm1d, nn.Dropout, nn.Identity, *ELEMENTWISE_LAYERS)


def _is_flat(node: fx.Node, view: View) -> bool:
    """Whether a node is known to be ``(batch, channels)``."""
    while True:
        module = view.module(node)
        if isinstance(module, nn.Flatten):
            return (module.start_dim, module.end_dim) == (1, -1)
        if node.target in (torch.flatten, "flatten"):
            axes = {"start_dim": 0, "end_dim": -1, **dict(zip(("start_dim", "end_dim"), node.args[1:])), **node.kwargs}
            return (axes["start_dim"], axes["end_dim"]) == (1, -1)
        same_rank = node in view.kernels or isinstance(module, _SAME_RANK)
        if not same_rank or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]

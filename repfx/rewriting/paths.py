"""Paths of linear maps through a graph, also over slices of channels, and which of them nothing outside a match reads."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from repfx.algebra.kernel import NoKernel
from repfx.graphs.channel_slices import read_channel_slice, sliced_by
from repfx.graphs.operations import Op
from repfx.graphs.vocabulary import ELEMENTWISE, ELEMENTWISE_LAYERS
from repfx.rewriting.match import Term
from repfx.rewriting.view import META, View


def linear_paths(leaf: fx.Node, view: View) -> dict[fx.Node, tuple[Op, ...]]:
    """Return every node from which linear maps lead to `leaf`, with those maps. `leaf` itself comes first."""
    paths: dict[fx.Node, tuple[Op, ...]] = {leaf: ()}
    ops: tuple[Op, ...] = ()
    while (op := view.op(leaf)) is not None:
        ops = (op, *ops)
        leaf = op.source
        paths[leaf] = ops
    return paths


def closed(terms: Sequence[Term], inside: Collection[fx.Node]) -> list[Term]:
    """Return the terms on which nothing depends but each other and the nodes `inside`.

    Two terms may share maps: ``cat([conv(x), norm(conv(x))])``.
    """
    kept = list(terms)
    while True:
        known = {*inside, *(node for term in kept for op in term.ops for node in op.nodes)}
        still = [
            term for term in kept if all(user in known for op in term.ops for node in op.nodes for user in node.users)
        ]
        if len(still) == len(kept):
            return kept
        kept = still


# ---- slices of channels on the way

_FARTHEST = 16  # nodes on the way to the conv that says how many channels there are


def paths_over_slices(leaf: fx.Node, dimensions: int, view: View) -> dict[fx.Node, tuple[Op, ...]]:
    """Return every node from which linear maps and slices of channels lead to `leaf`, with these, as `linear_paths` does."""
    paths = linear_paths(leaf, view)
    while True:
        last = next(reversed(paths))
        source = sliced_by(last)
        channels = None if source is None else channels_of(source, dimensions, view)
        op = None if source is None or channels is None else read_channel_slice(last, source, channels, dimensions)
        if op is None:
            return paths
        behind = (op, *paths[last])
        paths.update({node: (*ops, *behind) for node, ops in linear_paths(op.source, view).items()})


def channels_of(node: fx.Node, dimensions: int, view: View) -> int | None:
    """Return how many channels a node has, if a conv or a BatchNorm before it, in so many dimensions, says so; else None."""
    pending = [node]
    for _ in range(_FARTHEST):
        if not pending:
            return None
        node = pending.pop(0)
        op, total = view.op(node), view.sum_of(node)
        if op is not None and op.meaning.kind == "conv":
            return _out_channels(op) if op.meaning.dimensions == dimensions else None
        if op is not None and _is_norm(op) and op.meaning.dimensions in (None, dimensions) and dimensions:
            return op.meaning.in_channels
        if op is not None:
            pending.append(op.source)
        elif total is not None:
            pending += [term for _, term in total.terms]
        elif _is_elementwise(node, view):
            pending.append(node.all_input_nodes[0])
    return None


def _out_channels(op: Op) -> int | None:
    """Return the channels of a conv's output, or None for a single one, which arithmetic behind it may make into several."""
    try:
        found = op.meaning.build(META, op.meaning.in_channels or 0, op.meaning.dimensions or 0).out_channels
    except NoKernel:
        return None
    return found if found > 1 else None


def _is_norm(op: Op) -> bool:
    """Whether a map scales and shifts by so many numbers, one for each channel."""
    return op.meaning.kind == "affine" and op.meaning.in_channels is not None


def _is_elementwise(node: fx.Node, view: View) -> bool:
    module = view.module(node)
    known = node.target in ELEMENTWISE if module is None else type(module) in ELEMENTWISE_LAYERS
    return known and len(node.all_input_nodes) == 1

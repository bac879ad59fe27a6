"""Paths of linear maps through a graph, and which of them nothing outside a match reads."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from repfx.graphs.operations import Op
from repfx.rewriting.match import Term
from repfx.rewriting.view import View


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

"""The patterns that rules look for: two linear maps in sequence, a single one, or a sum of paths that start at one node.

Patterns are structure only. They see a graph through a `View`, which reads a node as a linear map only if rules may change it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from repfx.algebra.kernel import Kernel, NoKernel, is_symmetric
from repfx.algebra.meaning import Kind
from repfx.graphs.bordered_padding import Border, padded_before, read_border
from repfx.graphs.functional_conv import read_functional_conv
from repfx.graphs.operations import Op
from repfx.graphs.sums import adds_up
from repfx.rewriting.match import Match, Term, cost_of_convs, shape_before, term_kernel
from repfx.rewriting.paths import closed, linear_paths
from repfx.rewriting.view import META, View


class Pattern:
    """The structure that a rule looks for at a node.

    `holds_in_training` says whether a match consists of whole layers and depends on their sizes alone, so that it stays a match while
    parameters are trained. `squeeze` goes by such patterns.
    """

    holds_in_training: ClassVar[bool] = True

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        """Yield every match at `node` that the rule may take, the best first."""
        raise NotImplementedError

    def match(self, node: fx.Node, view: View) -> Match | None:
        """Return the best match at `node`, or None."""
        return next(self.matches(node, view), None)


@dataclass(frozen=True)
class Single(Pattern):
    """One linear map of these kinds."""

    kinds: frozenset[Kind]

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        op = view.op(node)
        if op is not None and op.meaning.kind in self.kinds:
            yield Match(node, op.source, (Term((op,)),))


@dataclass(frozen=True)
class FunctionalConv(Pattern):
    """One call of a function for convs, with a weight that depends on no input. Other patterns don't see such calls."""

    holds_in_training = False

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        op = read_functional_conv(node, view.constants)
        if isinstance(op, Op):
            yield Match(node, op.source, (Term((op,)),))


@dataclass(frozen=True)
class Bordered(Pattern):
    """A conv whose output is cropped or padded, where the conv can do that by its own padding.

    A 1×1 conv can be padded with what it outputs for zero. Other nodes that read the conv then get a cropped output. Any conv may be
    cropped, also together with the padding in front of it, or padded on both sides of it. A padding by zeros behind the conv alone stays,
    because the conv would have to compute what is padded. If a conv or a sum reads the padding, it is left to these.
    """

    holds_in_training = False

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        border = read_border(node, view.op(node), view.module(node), view.constants)
        padded = None if border is None else _padded_before(node, border, "conv", view)
        if border is not None and padded is not None:
            cropped = ((padded.node, border.padding), *border.partial)
            yield Match(node, padded.source, (Term((padded,)),), inner=border.inner, cropped=cropped)
        yield from (match for match in _around_conv(node, view) if _pads_alike(match))


def _padded_before(node: fx.Node, border: Border, kind: Kind, view: View) -> Op | None:
    """Return the map of a kind whose output has a border in `node`, with zeros padded around its input instead; None if there is none."""
    op = view.op_for(border.source, (node, *border.inner))
    return padded_before(op, border) if op is not None and op.meaning.kind == kind else None


def _around_conv(node: fx.Node, view: View) -> Iterator[Match]:
    """Yield the matches of a conv, the paddings in front of it, and the crops and paddings behind it up to a node."""
    behind = _row_up_to(node, ("crop", "pad"), view)
    conv = view.op(behind[0].source) if behind else None
    if conv is None or conv.meaning.kind != "conv":
        return
    if behind[-1].meaning.kind == "pad" and any(_pads_by_itself(user, view) for user in node.users):
        return
    front = _row_up_to(conv.source, ("crop", "pad", "subsample"), view)
    crops = any(op.meaning.kind == "crop" for op in behind)
    for ops in ((*front, conv, *behind),) * bool(front) + ((conv, *behind),) * crops:
        yield Match(node, ops[0].source, (Term(ops),))


def _pads_alike(match: Match) -> bool:
    """Whether a match is a conv that pads both sides alike, as torch's convs do."""
    try:
        return is_symmetric(match.form.padding)
    except NoKernel:
        return False


def _pads_by_itself(node: fx.Node, view: View) -> bool:
    """Whether a rule merges a node with the padding in front of it."""
    op = view.op(node)
    return view.sum_of(node) is not None or (op is not None and op.meaning.kind not in ("affine", "identity"))


def _row_up_to(node: fx.Node, kinds: Collection[Kind], view: View) -> tuple[Op, ...]:
    """Return the linear maps of these kinds that lead to a node, one after another."""
    ops: tuple[Op, ...] = ()
    while (op := view.op(node)) is not None and op.meaning.kind in kinds:
        ops = (op, *ops)
        node = op.source
    return ops


@dataclass(frozen=True)
class Sequence(Pattern):
    """A linear map of one of the `first` kinds whose output enters one of the `second` kinds.

    A scale and shift may have a border written around its output, of the values that it gives to zeros.
    """

    first: frozenset[Kind]
    second: frozenset[Kind]

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        second = view.op(node)
        if second is None or second.meaning.kind not in self.second:
            return
        first = view.op(second.source)
        if first is not None and first.meaning.kind in self.first:
            yield Match(node, first.source, (Term((first, second)),))
        if "affine" in self.first:
            yield from _over_a_border(second, view)


def _over_a_border(second: Op, view: View) -> Iterator[Match]:
    """Yield the match of a map and the scale and shift before it, around whose output a border is written."""
    between = second.source
    border = read_border(between, view.op(between), view.module(between), view.constants)
    first = None if border is None else _padded_before(between, border, "affine", view)
    if border is not None and first is not None:
        yield Match(
            second.node, first.source, (Term((first, second)),), inner=(between, *border.inner), written=border.inner
        )


@dataclass(frozen=True)
class Sum(Pattern):
    """A tree of sums in which at least two terms are linear maps of one node, one of them a conv.

    The other terms are the match's remainder. If the tree can't be merged as a whole, its parts may be: two blocks of a sum whose windows
    don't go together are still one conv each. Terms are grouped so that they cost little: beside dense 3×3 convs, a depthwise 7×7 conv
    stays by itself.
    """

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        if view.sum_of(node) is None or _is_inner(node, view):
            return
        _, inner = _leaves(node, view)
        whole = list(_matches_of_tree(node, view))
        # no other match has more terms, so the parts below may never be asked for
        yield from (match for match in whole if not match.remainder and not match.shares_maps)
        found = [match for match in whole if match.remainder or match.shares_maps]
        parts = [part for part in inner if view.sum_of(part) is not None]
        found += [match for part in parts for match in _matches_of_tree(part, view)]
        # Matches with a remainder come last: they take the tree apart, and other parts of it may be one convolution. Before them come those
        # whose terms share maps: where the terms part, a smaller sum may begin.
        yield from sorted(found, key=lambda match: (bool(match.remainder), match.shares_maps, -len(match.terms)))


def _is_inner(node: fx.Node, view: View) -> bool:
    """Whether a sum is only a term of a larger sum, which is visited later."""
    users = [*node.users]
    if len(users) == 1 and adds_up(users[0]):
        users = [*users[0].users]
    found = view.sum_of(users[0]) if len(users) == 1 else None
    return found is not None and any(term is node for _, term in found.terms)


def _matches_of_tree(root: fx.Node, view: View) -> Iterator[Match]:
    leaves, inner = _leaves(root, view)
    for match in _groups(leaves, {root, *inner}, view):
        yield from _cheapest_groups(replace(match, root=root, inner=tuple(inner)), view)


_Leaf = tuple[float, fx.Node, fx.Node]  # a term of a sum with its factor and the addition that it enters


def _leaves(root: fx.Node, view: View) -> tuple[list[_Leaf], list[fx.Node]]:
    """Return the terms of a sum, and the nodes below the root that only it uses: the additions and stacks of which it consists."""
    leaves: list[_Leaf] = []
    inner: list[fx.Node] = []
    pending: list[_Leaf] = [(1, root, root)]
    while pending:
        factor, node, adder = pending.pop(0)
        found = view.sum_of(node) if node is root or len(node.users) == 1 else None
        if found is None:
            leaves.append((factor, node, adder))
            continue
        inner += [each for each in (node, *found.inner) if each is not root]
        pending[:0] = [(factor * own, term, node) for own, term in found.terms]
    return leaves, inner


def _groups(leaves: list[_Leaf], inside: Collection[fx.Node], view: View) -> Iterator[Match]:
    """Group the terms that start at one node, so that each group is one convolution. Do so for each node where two or more terms start."""
    paths = [linear_paths(leaf, view) for _, leaf, _ in leaves]
    sources = Counter(source for path in paths for source in path)
    for source, count in sources.items():
        if count < 2:
            continue
        starting = ((index, path[source], leaves[index]) for index, path in enumerate(paths) if source in path)
        found = {index: Term(ops, factor, adder) for index, ops, (factor, _, adder) in starting}
        whole = closed(list(found.values()), inside)
        # terms with a conv first: they fix the sizes that an identity or a pooling takes on
        terms = [(index, term) for index, term in found.items() if term in whole]
        terms.sort(key=lambda item: not _has_conv(item[1], view))
        while terms and _has_conv(terms[0][1], view):
            chosen = _that_add_up(terms, source)
            chosen = {index: term for index, term in chosen.items() if term in closed(list(chosen.values()), inside)}
            if len(chosen) > 1:
                remainder = tuple(leaf[:2] for index, leaf in enumerate(leaves) if index not in chosen)
                yield Match(source, source, tuple(chosen.values()), remainder=remainder)
            taken = chosen or {terms[0][0]}  # a term that is no convolution even by itself
            terms = [(index, term) for index, term in terms if index not in taken]


def _cheapest_groups(match: Match, view: View) -> list[Match]:
    """Divide the terms of a match into groups that cost less, as one conv each, than all of them as one. Return those of several terms.

    Return the match itself if there are none. The dearest terms come first, so their order in the sum doesn't count. Each joins the group
    to which it adds least.
    """
    if match.shares_maps:  # what a map costs is no matter of one term
        return [match]
    whole = _cost_of_one(match, view)
    alone = [(cost_of_convs((term,), match, view.cost_of, view), term) for term in match.terms]
    if whole <= max(cost for cost, _ in alone):
        return [match]
    groups: list[tuple[float, Match]] = []
    for cost, term in sorted(alone, key=lambda each: -each[0]):
        joined = [
            (_cost_of_one(group := replace(match, terms=(*before.terms, term)), view) - known, index, group)
            for index, (known, before) in enumerate(groups)
        ]
        more, index, group = min(joined, default=(math.inf, 0, match))
        if more <= cost:
            groups[index] = (groups[index][0] + more, group)
        elif _has_conv(term, view):
            groups.append((cost, replace(match, terms=(term,))))
    if sum(cost for cost, _ in groups) >= whole:
        return [match]
    return [_among(group, match) for _, group in groups if len(group.terms) > 1] or [match]


def _among(group: Match, match: Match) -> Match:
    """Return a group of the terms of a match; the other terms become a part of its remainder."""
    merged = set(map(id, group.terms))  # two terms may be equal, as in x + x
    others = (term for term in match.terms if id(term) not in merged)
    ends = ((term.factor, term.ops[-1].node if term.ops else match.source) for term in others)
    return replace(group, remainder=(*ends, *match.remainder))


def _cost_of_one(match: Match, view: View) -> float:
    try:
        return view.cost_of(match.form, shape_before(match, view))
    except NoKernel:
        return math.inf


def _has_conv(term: Term, view: View) -> bool:
    return any(view.is_conv(op.node) for op in term.ops)


def _that_add_up(terms: list[tuple[int, Term]], source: fx.Node) -> dict[int, Term]:
    """Return the first term that is a convolution by itself, and each later one that makes a convolution with those before it."""
    chosen: dict[int, Term] = {}
    total: Kernel | None = None
    for index, term in terms:
        try:
            channels, dimensions = Match(source, source, (*chosen.values(), term)).sizes()
            kernel = term_kernel(term, META, channels, dimensions).scaled(term.factor)
            total = kernel if total is None else total.add(kernel)
        except NoKernel:
            continue
        chosen[index] = term
    return chosen

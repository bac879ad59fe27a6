"""The patterns that rules look for: two linear maps in sequence, a single one, or a sum of paths that start at one node.

Patterns are structure only. They see a graph through a `View`, which reads a node as a linear map only if rules may change it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from repfx.algebra.kernel import Kernel, NoKernel
from repfx.algebra.meaning import Kind
from repfx.graphs.bordered_padding import padded_before, read_border
from repfx.graphs.functional_conv import read_functional_conv
from repfx.graphs.operations import Op
from repfx.graphs.vocabulary import ADDITIONS, SUBTRACTIONS
from repfx.rewriting.carried import norm_behind, norm_in_front
from repfx.rewriting.match import Match, Term, signed, term_kernel
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
        if op is not None:
            yield Match(node, op.source, (Term((op,)),))


@dataclass(frozen=True)
class BorderedPadding(Pattern):
    """A 1×1 conv whose output is padded with what the conv outputs for zero."""

    holds_in_training = False

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        pad = view.op(node)
        conv = view.op(pad.source) if pad is not None and pad.meaning.kind == "pad" else None
        if pad is None or conv is None or conv.meaning.kind != "conv":
            return
        channels, dimensions = conv.meaning.in_channels or 0, conv.meaning.dimensions or 0
        try:
            out_channels = conv.meaning.build(META, channels, dimensions).out_channels
            zeros = pad.meaning.build(META, out_channels, pad.meaning.dimensions or dimensions)
        except NoKernel:
            return
        if zeros.padding_mode != "zeros" or zeros.dimensions != dimensions:
            return
        border = read_border(node, zeros.padding, out_channels, view.constants)
        padded = None if border is None else padded_before(conv, zeros.padding, border)
        if border is not None and padded is not None:
            yield Match(node, conv.source, (Term((padded,)),), inner=border.writes)


@dataclass(frozen=True)
class Sequence(Pattern):
    """A linear map of one of the `first` kinds whose output enters one of the `second` kinds.

    Between a conv and a BatchNorm, in either order, there may be nodes that the BatchNorm's scale and shift can pass.
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
        elif "conv" in self.first and second.meaning.kind == "affine":
            yield from norm_behind(second, view)
        elif "affine" in self.first and second.meaning.kind == "conv":
            yield from norm_in_front(second, view)


@dataclass(frozen=True)
class Sum(Pattern):
    """A tree of additions and subtractions in which at least two terms are linear maps of one node, one of them a conv.

    The other terms are the match's remainder. If the tree can't be merged as a whole, its parts may be: two blocks of a sum whose windows
    don't go together are still one conv each.
    """

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        if not is_sum(node, view) or _is_inner(node, view):
            return
        _, inner = _leaves(node, view)
        whole = list(_matches_of_tree(node, view))
        # no other match has more terms, so the parts below may never be asked for
        yield from (match for match in whole if not match.remainder)
        found = [match for match in whole if match.remainder]
        found += [match for part in inner for match in _matches_of_tree(part, view)]
        # matches with a remainder come last: they take the tree apart, and other parts of it may be one convolution
        yield from sorted(found, key=lambda match: (bool(match.remainder), -len(match.terms)))


def _matches_of_tree(root: fx.Node, view: View) -> Iterator[Match]:
    leaves, inner = _leaves(root, view)
    for match in _groups(leaves, view):
        yield replace(match, root=root, inner=tuple(inner))


def is_sum(node: fx.Node, view: View) -> bool:
    """Whether a node adds or subtracts two nodes, neither of which is a constant."""
    if node.op not in ("call_function", "call_method") or node.target not in ADDITIONS | SUBTRACTIONS:
        return False
    both = len(node.args) == 2 and not node.kwargs and all(isinstance(argument, fx.Node) for argument in node.args)
    return both and all(view.constants.number(argument) is None for argument in node.args)


def _is_inner(node: fx.Node, view: View) -> bool:
    """Whether a sum is only a part of a larger sum, which is visited later."""
    return len(node.users) == 1 and is_sum(next(iter(node.users)), view)


def _leaves(root: fx.Node, view: View) -> tuple[list[tuple[int, fx.Node, fx.Node]], list[fx.Node]]:
    """Return the terms of a sum, each with its sign and the addition that it enters, and the additions below the root that only it uses."""
    leaves, inner, pending = [], [], [(1, root, root)]
    while pending:
        sign, node, adder = pending.pop(0)
        if node is not root and (len(node.users) > 1 or not is_sum(node, view)):
            leaves.append((sign, node, adder))
            continue
        if node is not root:
            inner.append(node)
        second_sign = -sign if node.target in SUBTRACTIONS else sign
        pending[:0] = [(s, term, node) for s, term in zip((sign, second_sign), node.args) if isinstance(term, fx.Node)]
    return leaves, inner


def _groups(leaves: list[tuple[int, fx.Node, fx.Node]], view: View) -> Iterator[Match]:
    """Group the terms that start at one node, so that each group is one convolution. Do so for each node where two or more terms start."""
    paths = [linear_paths(leaf, view) for _, leaf, _ in leaves]
    sources = Counter(source for path in paths for source in path)
    for source, count in sources.items():
        if count < 2:
            continue
        signed_leaves = ((index, path[source], leaves[index]) for index, path in enumerate(paths) if source in path)
        terms = [(index, Term(ops, sign, adder)) for index, ops, (sign, _, adder) in signed_leaves]
        # terms with a conv first: they fix the sizes that an identity or a pooling takes on
        terms.sort(key=lambda item: not _has_conv(item[1], view))
        while terms and _has_conv(terms[0][1], view):
            chosen = _that_add_up(terms, source)
            if len(chosen) > 1:
                remainder = tuple(leaf[:2] for index, leaf in enumerate(leaves) if index not in chosen)
                yield Match(source, source, tuple(chosen.values()), remainder=remainder)
            taken = chosen or {terms[0][0]}  # a term that is no convolution even by itself
            terms = [(index, term) for index, term in terms if index not in taken]


def _has_conv(term: Term, view: View) -> bool:
    return any(view.is_conv(op.node) for op in term.ops)


def linear_paths(leaf: fx.Node, view: View) -> dict[fx.Node, tuple[Op, ...]]:
    """Return every node from which linear maps that nothing else uses lead to `leaf`, with those maps. `leaf` itself comes first."""
    paths: dict[fx.Node, tuple[Op, ...]] = {leaf: ()}
    ops: tuple[Op, ...] = ()
    while len(leaf.users) == 1:
        op = view.op(leaf)
        if op is None:
            break
        ops = (op, *ops)
        leaf = op.source
        paths[leaf] = ops
    return paths


def _that_add_up(terms: list[tuple[int, Term]], source: fx.Node) -> dict[int, Term]:
    """Return the first term that is a convolution by itself, and each later one that makes a convolution with those before it."""
    chosen: dict[int, Term] = {}
    total: Kernel | None = None
    for index, term in terms:
        try:
            channels, dimensions = Match(source, source, (*chosen.values(), term)).sizes()
            kernel = signed(term_kernel(term, META, channels, dimensions), term.sign)
            total = kernel if total is None else total.add(kernel)
        except NoKernel:
            continue
        chosen[index] = term
    return chosen

"""Merge convs in sequence, such as 1×1 then k×k, where fewer convs cost no more.

Pairs alone don't show what is cheapest. In 1×1 → depthwise 3×3 → 1×1, each pair is dearer as one conv, and all three may be cheaper. In
three 1×1 convs, a pair that costs nothing to merge may keep a better pair apart. So a chain of convs is divided as a whole.

A bias in front of zero padding has a border, which no conv of the same input has. Then the merged conv reads a further channel of ones, and
the weights on it count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from repfx.algebra.kernel import NoKernel
from repfx.graphs.operations import Op
from repfx.passes.rules.fold_batch_norm import FOLD_BATCH_NORM
from repfx.rewriting.guards import channels_stay_put, is_convolution, no_dearer, unmutated, used_once
from repfx.rewriting.match import Match, Term, forms_along
from repfx.rewriting.patterns import Pattern
from repfx.rewriting.rule import Rule
from repfx.rewriting.view import View

_LONGEST = 8  # convs that one conv may replace, so that the time for a chain grows with its length alone

Convs = tuple[Op, ...]


@dataclass(frozen=True)
class Chain(Pattern):
    """Convs of which each reads the one before alone, divided into groups that cost the least if each of them is one conv.

    Matches are found at the last conv of the chain. The last match is the last two convs, whatever they cost and whoever reads them,
    so that a guard can say why they stay two.
    """

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        last = _conv(node, view)
        first = None if last is None else _conv(last.source, view)
        if last is None or first is None or _goes_on(node, view):
            return
        for group in _cheapest_groups(_convs_up_to(last, view), view):
            if len(group.ops) > 1:
                yield group
        yield _with_kernel((first, last), view) or _match((first, last))


def _match(convs: Convs, *, ones: bool = False) -> Match:
    return Match(convs[-1].node, convs[0].source, (Term(convs),), ones=ones)


def _conv(node: fx.Node, view: View) -> Op | None:
    op = view.op(node)
    return op if op is not None and op.meaning.kind == "conv" else None


def _goes_on(node: fx.Node, view: View) -> bool:
    """Whether a conv alone reads a node, maybe after a BatchNorm that is folded first."""
    user = next(iter(node.users), None)
    if user is None or len(node.users) > 1:
        return False
    return _conv(user, view) is not None or isinstance(FOLD_BATCH_NORM.find(user, view), Match)


def _convs_up_to(last: Op, view: View) -> Convs:
    convs = [last]
    while len(convs[-1].source.users) == 1 and (conv := _conv(convs[-1].source, view)) is not None:
        convs.append(conv)
    return tuple(reversed(convs))


def _cheapest_groups(chain: Convs, view: View) -> list[Match]:
    """Divide a chain so that the sum of costs is the least and, among equal sums, so that the groups are few."""
    whole = _match(chain)
    shapes = [shape for _, _, shape in forms_along(whole.terms[0], whole, view)]
    best: list[tuple[float, list[Match]]] = [(0.0, [])]  # for the first 0, 1, 2, … convs
    for stop in range(1, len(chain) + 1):
        options = []
        for start in range(stop - 1, max(-1, stop - 1 - _LONGEST), -1):
            group = _with_kernel(chain[start:stop], view)
            if group is None:  # nor has a longer group a kernel
                break
            cost = view.cost_of(group.form, shapes[start])
            options.append((best[start][0] + cost, [*best[start][1], group]))
        best.append(min(options, key=lambda option: (option[0], len(option[1]))))
    return best[-1][1]


def _with_kernel(convs: Convs, view: View) -> Match | None:
    """Return convs as one, with a channel of ones only if they need it. None if they are no conv."""
    for ones in (False, True)[: 1 + view.takes_ones]:
        match = _match(convs, ones=ones)
        try:
            _ = match.form
        except NoKernel:
            continue
        return match
    return None


MERGE_SEQUENTIAL = Rule(
    "merge_sequential",
    "Merge convs in sequence where fewer convs cost no more",
    Chain(),
    (used_once, is_convolution, channels_stay_put, unmutated, no_dearer),
    optional=True,
)

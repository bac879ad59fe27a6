"""Merge linear maps of one node, whose outputs are concatenated, with the conv that reads them (Inception without activations).

A conv of concatenated channels is the sum of one conv for each part, so the match is that of a sum. A part may see only some channels of
the node (FasterNet's partial conv).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, fx

from repfx.algebra.kernel import Kernel, NoKernel
from repfx.graphs.operations import Op
from repfx.graphs.vocabulary import CONCATENATIONS, listed
from repfx.rewriting.guards import channels_stay_put, is_convolution, no_dearer, slices_channels, unmutated, used_once
from repfx.rewriting.match import Match, Term, term_kernel
from repfx.rewriting.paths import closed, paths_over_slices
from repfx.rewriting.patterns import Pattern
from repfx.rewriting.rule import Rule
from repfx.rewriting.view import META, View


@dataclass(frozen=True)
class Concatenation(Pattern):
    """A conv without groups that reads concatenated linear maps of one node.

    The axis isn't read. If the channels of the parts add up to those that the conv reads, the axis must be that of the channels:
    along any other axis, each part alone would have as many channels as the conv reads.
    """

    holds_in_training = False

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        conv = view.op(node)
        if conv is None or conv.meaning.kind != "conv" or conv.source.target not in CONCATENATIONS:
            return
        parts, _ = listed(conv.source)
        if not parts or not all(isinstance(part, fx.Node) for part in parts):
            return
        inside = {node, *conv.nodes, conv.source}
        paths = [paths_over_slices(part, conv.meaning.dimensions or 0, view) for part in parts]
        for source in paths[0]:
            if all(source in path for path in paths):
                ways = [Term(path[source]) for path in paths]
                terms = _terms(conv, ways) if len(closed(ways, inside)) == len(ways) else None
                if terms is not None:
                    yield Match(node, source, terms)


def _terms(conv: Op, parts: list[Term]) -> tuple[Term, ...] | None:
    """Return each part followed by the conv on that part's channels, or None if the parts are not all that the conv reads."""
    try:
        behind = replace(conv, meaning=replace(conv.meaning, in_channels=None))
        terms = tuple(Term((*part.ops, behind)) for part in parts)
        channels, dimensions = Match(conv.node, conv.source, terms).sizes()
        counts = [term_kernel(part, META, channels, dimensions).out_channels for part in parts]
        groups = conv.meaning.build(META, sum(counts), dimensions).groups
    except NoKernel:
        return None
    if len(parts) < 2 or sum(counts) != conv.meaning.in_channels or groups > 1:
        return None
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return tuple(
        Term((*part.ops, _slice(conv, end - count, end))) for part, count, end in zip(parts, counts, ends, strict=True)
    )


def _slice(conv: Op, start: int, stop: int) -> Op:
    """Return the conv on some of its input channels. Only the slice that begins at channel 0 has its bias."""

    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        whole = conv.meaning.build(like, conv.meaning.in_channels or 0, dimensions)
        part = whole.slice_inputs(start, stop)
        return part if start else replace(part, bias=whole.bias)

    meaning = replace(conv.meaning, in_channels=stop - start, build=build)
    return Op(conv.node, conv.source, meaning, inner=(*conv.inner, conv.source))


MERGE_CONCAT = Rule(
    "merge_concat",
    "Merge convs of one input, whose outputs are concatenated, with the conv that follows",
    Concatenation(),
    (used_once, is_convolution, channels_stay_put, slices_channels, unmutated, no_dearer),
    optional=True,
)

"""Fold a BatchNorm into a conv or linear layer through what lies between: a permutation, an average, a concatenation.

The conv may stand before the BatchNorm, or behind it if no zero padding comes between the two or if the BatchNorm has no shift.
"""

from __future__ import annotations

from repfx.passes.rules.merge_concat import MERGE_CONCAT
from repfx.rewriting.carried import NormApart
from repfx.rewriting.guards import carried_alone, each_part, is_convolution, unmutated
from repfx.rewriting.match import Match
from repfx.rewriting.rule import Rule
from repfx.rewriting.view import View


def apart_from_concat(match: Match, view: View) -> str | None:
    """Leave a concatenation of linear maps of one node to the rule that merges all of it."""
    merged = isinstance(MERGE_CONCAT.find(match.root, view), Match)
    return "the concatenation is merged as a whole" if merged else None


FOLD_BATCH_NORM_THROUGH = Rule(
    "fold_batch_norm_through",
    "Fold a BatchNorm into the convs before or after it through permutations, averages and concatenations",
    NormApart(),
    (carried_alone, each_part(is_convolution), each_part(unmutated), apart_from_concat),
)

"""Fold a BatchNorm into a conv or linear layer through what lies between: a permutation, an average, a concatenation.

The conv may stand before the BatchNorm, or behind it if no zero padding comes between the two or if the BatchNorm has no shift.
"""

from __future__ import annotations

from repfx.rewriting.carried import NormApart
from repfx.rewriting.guards import carried_alone, each_part, is_convolution, unmutated
from repfx.rewriting.rule import Rule

FOLD_BATCH_NORM_THROUGH = Rule(
    "fold_batch_norm_through",
    "Fold a BatchNorm into the convs before or after it through permutations, averages and concatenations",
    NormApart(),
    (carried_alone, each_part(is_convolution), each_part(unmutated)),
)

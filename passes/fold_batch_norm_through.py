"""Fold a BatchNorm into the conv or linear layer before it through what lies between: a permutation, an average, a concatenation."""

from __future__ import annotations

from repfx.rewriting.carried import NormBehind
from repfx.rewriting.guards import carried_alone, each_part, is_convolution, unmutated
from repfx.rewriting.rule import Rule

FOLD_BATCH_NORM_THROUGH = Rule(
    "fold_batch_norm_through",
    "Fold a BatchNorm into the convs before it through permutations, averages and concatenations",
    NormBehind(),
    (carried_alone, each_part(is_convolution), each_part(unmutated)),
)

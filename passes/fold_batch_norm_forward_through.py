"""Fold a BatchNorm into the conv or linear layer after it through what lies between, such as a permutation or an average.

This is exact if no zero padding comes between the two, or if the BatchNorm has no shift.
"""

from __future__ import annotations

from repfx.rewriting.carried import NormInFront
from repfx.rewriting.guards import carried_alone, is_convolution, unmutated
from repfx.rewriting.rule import Rule

FOLD_BATCH_NORM_FORWARD_THROUGH = Rule(
    "fold_batch_norm_forward_through",
    "Fold a BatchNorm into the conv after it through permutations and averages",
    NormInFront(),
    (carried_alone, is_convolution, unmutated),
)

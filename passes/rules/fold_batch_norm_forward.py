"""Fold a BatchNorm into the conv or linear layer after it.

This is exact if no zero padding comes between the two, or if the BatchNorm has no shift.
"""

from __future__ import annotations

from repfx.rewriting.guards import channels_stay_put, input_is_known, is_convolution, no_dearer, unmutated, used_once
from repfx.rewriting.patterns import Sequence
from repfx.rewriting.rule import Rule

FOLD_BATCH_NORM_FORWARD = Rule(
    "fold_batch_norm_forward",
    "Fold a BatchNorm, or a scale or shift per channel, into the conv after it",
    Sequence(first=frozenset({"affine"}), second=frozenset({"conv"})),
    (input_is_known, used_once, is_convolution, channels_stay_put, unmutated, no_dearer),
)

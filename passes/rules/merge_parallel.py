"""Merge the terms of a sum that start at one node: convs, identities, BatchNorms, poolings and chains of them become one conv."""

from __future__ import annotations

from repfx.rewriting.guards import channels_stay_put, is_convolution, no_dearer, unmutated, used_once
from repfx.rewriting.patterns import Sum
from repfx.rewriting.rule import Rule

MERGE_PARALLEL = Rule(
    "merge_parallel",
    "Merge parallel convs, identities and poolings whose outputs are added or subtracted",
    Sum(),
    (used_once, is_convolution, channels_stay_put, unmutated, no_dearer),
)

"""Merge two convs in sequence, 1×1 then k×k or k×k then 1×1, if the merged conv costs no more."""

from __future__ import annotations

from repfx.rewriting.guards import channels_stay_put, is_convolution, no_dearer, unmutated, used_once
from repfx.rewriting.patterns import Sequence
from repfx.rewriting.rule import Rule

MERGE_SEQUENTIAL = Rule(
    "merge_sequential",
    "Merge two convs in sequence into one that costs no more",
    Sequence(first=frozenset({"conv"}), second=frozenset({"conv"})),
    (used_once, is_convolution, channels_stay_put, unmutated, no_dearer),
    optional=True,
)

"""Absorb a layer that pads, or that leaves positions out, into the conv after it."""

from __future__ import annotations

from repfx.rewriting.guards import is_convolution, no_dearer, pads_alike, unmutated, used_once
from repfx.rewriting.patterns import Sequence
from repfx.rewriting.rule import Rule

ABSORB_PADDING = Rule(
    "absorb_padding",
    "Let a conv do the padding or the striding of the layer before it",
    Sequence(first=frozenset({"pad", "subsample"}), second=frozenset({"conv"})),
    (used_once, is_convolution, pads_alike, unmutated, no_dearer),
)

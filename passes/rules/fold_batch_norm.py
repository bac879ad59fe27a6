"""Fold a BatchNorm into the conv or linear layer before it: ``W ← W·γ/s``, ``b ← β + (b - μ)·γ/s``, s = √(σ² + ε)."""

from __future__ import annotations

from repfx.rewriting.guards import channels_stay_put, is_convolution, no_dearer, unmutated, used_once
from repfx.rewriting.patterns import Sequence
from repfx.rewriting.rule import Rule

FOLD_BATCH_NORM = Rule(
    "fold_batch_norm",
    "Fold a BatchNorm, or a scale or shift per channel, into the conv before it",
    Sequence(first=frozenset({"conv"}), second=frozenset({"affine"})),
    (used_once, is_convolution, channels_stay_put, unmutated, no_dearer),
)

"""Let a 1×1 conv pad with zeros before it, where its output is padded with what it gives out for zero."""

from __future__ import annotations

from repfx.rewriting.guards import unmutated, used_once
from repfx.rewriting.patterns import BorderedPadding
from repfx.rewriting.rule import Rule

ABSORB_BORDER = Rule(
    "absorb_border",
    "Let a 1×1 conv pad before it, where its output is padded with what it gives out for zero",
    BorderedPadding(),
    (used_once, unmutated),
    optional=True,
)

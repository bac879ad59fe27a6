"""Let a 1×1 conv pad its input with zeros, if its output is padded with the values that it returns for zeros."""

from __future__ import annotations

from repfx.rewriting.guards import unmutated, used_once
from repfx.rewriting.patterns import BorderedPadding
from repfx.rewriting.rule import Rule

ABSORB_BORDER = Rule(
    "absorb_border",
    "Let a 1×1 conv pad its input with zeros, if its output is padded with the values that it returns for zeros",
    BorderedPadding(),
    (used_once, unmutated),
    optional=True,
)

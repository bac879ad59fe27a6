"""Let a conv do by its own padding what is cropped from its output, or padded around it with the values that it returns there."""

from __future__ import annotations

from repfx.rewriting.guards import is_convolution, no_dearer, unmutated, used_once
from repfx.rewriting.patterns import Bordered
from repfx.rewriting.rule import Rule

ABSORB_BORDER = Rule(
    "absorb_border",
    "Let a conv crop by its own padding, and pad where its output is padded with the values that it returns there",
    Bordered(),
    (used_once, is_convolution, unmutated, no_dearer),
    optional=True,
)

"""Let a conv leave out what is cropped from its output, also where its input is padded."""

from __future__ import annotations

from repfx.rewriting.guards import is_convolution, no_dearer, pads_alike, unmutated, used_once
from repfx.rewriting.patterns import Cropped
from repfx.rewriting.rule import Rule

ABSORB_CROP = Rule(
    "absorb_crop",
    "Let a conv do by its own padding what is cropped from its output, or padded on both sides of it",
    Cropped(),
    (used_once, is_convolution, pads_alike, unmutated, no_dearer),
    optional=True,
)

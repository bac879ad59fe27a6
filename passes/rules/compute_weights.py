"""Turn a conv that computes its weight from parameters, or that is written as a function call, into a plain conv."""

from __future__ import annotations

from repfx.rewriting.guards import unmutated, weight_of_its_own
from repfx.rewriting.patterns import FunctionalConv
from repfx.rewriting.rule import Rule

COMPUTE_WEIGHTS = Rule(
    "compute_weights",
    "Turn a conv whose weight is computed from parameters into a plain conv",
    FunctionalConv(),
    (weight_of_its_own, unmutated),
)

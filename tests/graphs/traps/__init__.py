"""Models that a tracer easily gets wrong, one file for each kind of oddity."""

from __future__ import annotations

from tests.graphs.traps import asking, inputs, keeping, names, own_code, reaching, without_source, writing

TRAPS = (
    own_code.TRAPS
    | inputs.TRAPS
    | writing.TRAPS
    | reaching.TRAPS
    | names.TRAPS
    | asking.TRAPS
    | keeping.TRAPS
    | without_source.TRAPS
)

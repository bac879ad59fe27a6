"""Models that a tracer easily gets wrong, one file for each kind of oddity. Those in `hooks` are tested by `test_collecting`."""

from __future__ import annotations

from tests.tracing.traps import asking, chance, inputs, keeping, names, own_code, reaching, without_source, writing

TRAPS = (
    own_code.TRAPS
    | chance.TRAPS
    | inputs.TRAPS
    | writing.TRAPS
    | reaching.TRAPS
    | names.TRAPS
    | asking.TRAPS
    | keeping.TRAPS
    | without_source.TRAPS
)

"""Models that a tracer easily gets wrong, one file for each kind of oddity. Those in `hooks` are tested by `test_collecting`."""

from __future__ import annotations

from tests.graphs.traps import chance, inputs, names, own_code, reaching, writing

TRAPS = own_code.TRAPS | chance.TRAPS | inputs.TRAPS | writing.TRAPS | reaching.TRAPS | names.TRAPS

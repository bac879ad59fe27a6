"""Models that a tracer easily gets wrong, one file for each kind of oddity."""

from __future__ import annotations

from tests.graphs.traps import chance, hooks, inputs, names, own_code, reaching, writing

TRAPS = own_code.TRAPS | chance.TRAPS | hooks.TRAPS | inputs.TRAPS | writing.TRAPS | reaching.TRAPS | names.TRAPS

"""Models that a tracer is easily wrong about, by what is odd about them."""

from __future__ import annotations

from tests.graphs.traps import inputs, names, own_code, reaching, writing

TRAPS = own_code.TRAPS | inputs.TRAPS | writing.TRAPS | reaching.TRAPS | names.TRAPS

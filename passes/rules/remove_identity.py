"""Remove layers and calls that hand their input on: identities, activations of slope 1, drops of rate 0."""

from __future__ import annotations

from repfx.rewriting.guards import handed_on_alone
from repfx.rewriting.patterns import Single
from repfx.rewriting.rule import Rule

REMOVE_IDENTITY = Rule("remove_identity", "Remove identity layers", Single(frozenset({"identity"})), (handed_on_alone,))

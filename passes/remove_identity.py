"""Remove identity layers."""

from __future__ import annotations

from repfx.rewriting.patterns import Single
from repfx.rewriting.rule import Rule

REMOVE_IDENTITY = Rule("remove_identity", "Remove identity layers", Single(frozenset({"identity"})), ())

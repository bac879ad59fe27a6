"""Remove identity layers."""

from __future__ import annotations

from repfx.pattern import Single
from repfx.rule import Rule

REMOVE_IDENTITY = Rule("remove_identity", "Remove identity layers", Single(frozenset({"identity"})), ())

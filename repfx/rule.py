"""`Rule` = pattern + guards, and the registry of rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from repfx.errors import InvalidInput
from repfx.pattern import Match, Pattern, View
from repfx.reporting import Skip

Guard = Callable[[Match, View], str | None]

RULES: dict[str, Rule] = {}


@dataclass(frozen=True)
class Rule:
    """One rewrite: where the pattern matches and no guard objects, the match becomes one conv (or nothing, if it is the identity).

    Args:
        name: shows in reports; registered at once.
        description: one line.
        pattern: structure.
        guards: conditions, asked in order.
    """

    name: str
    description: str
    pattern: Pattern
    guards: tuple[Guard, ...]

    def __post_init__(self) -> None:
        if self.name in RULES and RULES[self.name] != self:
            raise InvalidInput(f"a rule named {self.name!r} is registered already.")
        RULES[self.name] = self

    def find(self, node: fx.Node, view: View) -> Match | Skip | None:
        """A match at `node`, or why it may not be rewritten, or None where the pattern isn't there."""
        match = self.pattern.match(node, view)
        if match is None:
            return None
        for guard in self.guards:
            reason = guard(match, view)
            if reason is not None:
                return Skip(node.name, reason, self.name)
        return match

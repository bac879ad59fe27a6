"""`Rule` = pattern + guards, and the registries of rules and passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from repfx.errors import InvalidInput
from repfx.records.registry import Registry
from repfx.records.report import Skip
from repfx.rewriting.match import Match
from repfx.rewriting.patterns import Pattern
from repfx.rewriting.view import View

Guard = Callable[[Match, View], str | None]

PASSES: Registry[Pass] = Registry("repfx.passes")
RULES: Registry[Rule] = Registry("repfx.passes")


@dataclass(frozen=True)
class Pass:
    """A named step of the compiler, rule or verb, as `repfx list passes` shows it."""

    name: str
    description: str

    def __post_init__(self) -> None:
        if self.name in PASSES.known:
            raise InvalidInput(f"a pass named {self.name!r} is registered already.")
        PASSES[self.name] = self


@dataclass(frozen=True)
class Rule:
    """One rewrite: where the pattern matches and no guard objects, the match becomes one conv (or nothing, if it is the identity).

    Args:
        name: shows in reports; registered at once.
        description: one line.
        pattern: structure.
        guards: conditions, asked in order.
        optional: whether a match that may not be rewritten is no loss worth reporting, as when two convs simply stay two.
    """

    name: str
    description: str
    pattern: Pattern
    guards: tuple[Guard, ...]
    optional: bool = False

    def __post_init__(self) -> None:
        Pass(self.name, self.description)
        RULES[self.name] = self

    def find(self, node: fx.Node, view: View) -> Match | Skip | None:
        """Return a match at `node`, or the reason why none may be rewritten, or None if the pattern isn't there."""
        refusal: Skip | None = None
        for match in self.pattern.matches(node, view):
            parts = (match, *match.others)
            reason = next(filter(None, (guard(part, view) for guard in self.guards for part in parts)), None)
            if reason is None:
                return match
            refusal = refusal or Skip(node.name, reason, self.name)
        return refusal

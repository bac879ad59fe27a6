"""The list of mutants: small mistakes as people make them, each with the tests that must fail.

Each wing has one file in `mutants/`. The text to replace must occur exactly once in its file, so a row that no longer applies
is noticed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
_LISTS = Path(__file__).with_name("mutants")


@dataclass(frozen=True)
class Mutant:
    """One mistake: in `file`, the text `old` becomes `new`. Each of `tests` must fail then."""

    wing: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def module(self) -> str:
        """The module that `file` holds. Files of `passes/` are imported as `repfx.passes`."""
        parts = Path(self.file).with_suffix("").parts
        return ".".join(parts if parts[0] == "repfx" else ("repfx", *parts))

    def mutated(self, source: str) -> str:
        """Return the source of `file` with the mistake."""
        found = source.count(self.old)
        if found != 1:
            raise ValueError(f"{self.name!r}: the text to replace occurs {found} times in {self.file}, not once.")
        return source.replace(self.old, self.new)


def read_mutants() -> tuple[Mutant, ...]:
    """Return all mutants, wing by wing."""
    return tuple(mutant for path in sorted(_LISTS.glob("*.toml")) for mutant in _mutants_in(path))


def _mutants_in(path: Path) -> list[Mutant]:
    rows: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(path.stem, **{**row, "tests": tuple(row["tests"])}) for row in rows]

"""Output of commands that is no table: JSON, lists of names, and text that fits the terminal."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Annotated

import typer

_NARROWEST = 14

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for other programs.")]


def print_json(found: object) -> None:
    """Print a result as JSON. It holds sizes and reasons, and no NaN or infinity, which JSON doesn't have."""
    typer.echo(json.dumps(found, indent=2, allow_nan=False))


def listing(rows: Iterable[tuple[str, str]], width: int | None = None) -> str:
    """Return names with their descriptions as text, one pair on each line.

    Args:
        width: columns of the terminal, within which descriptions are wrapped beside the names; None for one line each.

    >>> print(listing([("a", "short"), ("name", "a long description")], width=20))
    a     short
    name  a long
          description
    """
    rows = list(rows)
    indent = max((len(name) for name, _ in rows), default=0) + 2
    lines = []
    for name, description in rows:
        wrapped = [description] if width is None else _wrapped(description, max(width - indent, _NARROWEST))
        lines.append(f"{name:<{indent}}" + f"\n{'':<{indent}}".join(wrapped))
    return "\n".join(lines)


def with_wrapped_comments(text: str, width: int | None) -> str:
    """Return TOML text in which each paragraph of comments fits the terminal, if it is as narrow as `width` columns.

    >>> print(with_wrapped_comments("# a long\\n# comment\\n\\nkey = 1  # stays", 7))
    # a
    # long
    # comment
    <BLANKLINE>
    key = 1  # stays
    """

    def fitting(paragraph: re.Match[str]) -> str:
        lines = paragraph[0].splitlines()
        if width is None or max(map(len, lines)) <= width:
            return paragraph[0]
        return "\n".join(f"# {line}" for line in _wrapped(" ".join(line[2:] for line in lines), width - 2))

    return re.sub(r"^# .*(?:\n# .*)*", fitting, text, flags=re.MULTILINE)


def terminal_width() -> int | None:
    """Return the columns of the terminal that shows what is printed; None if a file or a program takes it."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)

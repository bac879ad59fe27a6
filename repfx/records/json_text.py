"""JSON from files, which anybody may have written: what is nested too deep for Python's stack is refused like any other malformed text."""

from __future__ import annotations

import json
from typing import Any

_DEEPEST = 100


def parse_json(text: str) -> Any:
    """Return the value that a JSON text holds.

    Raises:
        ValueError: the text is no JSON, or it is nested too deep.

    >>> parse_json('{"a": [1, 2]}')
    {'a': [1, 2]}
    >>> parse_json("[" * 5000 + "]" * 5000)
    Traceback (most recent call last):
        ...
    ValueError: it is nested too deep
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    require_shallow(found)
    return found


def require_shallow(value: Any) -> None:
    """Raise `ValueError` for lists and dicts inside each other more than a hundred times."""
    level = [value]
    for _ in range(_DEEPEST):
        inner = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list)))
        level = [each for part in inner for each in part if isinstance(each, (dict, list))]
        if not level:
            return
    raise ValueError("it is nested too deep")

"""Names for the modules that take the place of calls in graphs."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator


def free_names(stem: str, taken: Container[str]) -> Iterator[str]:
    """Yield names ``stem_0``, ``stem_1``, … without end, but for those that are taken.

    >>> names = free_names("dropout", {"dropout_0"})
    >>> next(names), next(names)
    ('dropout_1', 'dropout_2')
    """
    numbered = (f"{stem}_{index}" for index in itertools.count())
    return (name for name in numbered if name not in taken)

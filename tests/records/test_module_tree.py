"""Modules are found in whatever holds them: containers, and functions with what they close over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import nn

from repfx.records.module_tree import modules_in


def closing_over(part: nn.Module) -> Any:
    return lambda: part


def with_a_default(part: nn.Module) -> Any:
    def function(held: Any = part) -> Any:
        return held

    return function


def with_a_keyword(part: nn.Module) -> Any:
    def function(*, held: Any = part) -> Any:
        return held

    return function


HOLDERS: dict[str, Callable[[nn.Module], Any]] = {
    "itself": lambda part: part,
    "list": lambda part: [1, part],
    "tuple": lambda part: (1, part),
    "set": lambda part: {1, part},
    "frozenset": lambda part: frozenset({1, part}),
    "deque": lambda part: deque([1, part]),
    "dict": lambda part: {"a": part},
    "a list in a dict": lambda part: {"a": [part]},
    "partial of it": partial,
    "partial with it": lambda part: partial(print, part),
    "partial by keyword": lambda part: partial(print, end=part),
    "method": lambda part: part.forward,
    "closure": closing_over,
    "default": with_a_default,
    "keyword's default": with_a_keyword,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_module_is_found_where_it_is_held(holder: str) -> None:
    part = nn.Identity()
    assert list(modules_in(HOLDERS[holder](part))) == [part]


@pytest.mark.parametrize("value", [1, "text", None, [], {"a": 1}, print, len])
def test_elsewhere_there_is_none(value: object) -> None:
    assert list(modules_in(value)) == []

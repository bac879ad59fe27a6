"""A dataclass of plain values is read back with the kinds that its fields name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from repfx.errors import InvalidInput
from repfx.records.plain_values import from_plain, to_plain


@dataclass(frozen=True)
class Kinds:
    ordered: Sequence[str] = ()
    listed: list[int] | None = None
    fixed: tuple[float, ...] = ()


@pytest.mark.parametrize("found", [Kinds(), Kinds(("a", "b"), [1, 2], (0.5,))])
def test_sequences_come_back(found: Kinds) -> None:
    assert from_plain(Kinds, to_plain(found)) == found


@pytest.mark.parametrize("name", ["ordered", "listed", "fixed"])
def test_a_text_is_no_list(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"{name} is 'abc'; it must be a list"):
        from_plain(Kinds, {name: "abc"})


@dataclass(frozen=True)
class Numbers:
    count: int = 0
    share: float = 0.0
    chosen: bool = False


@pytest.mark.parametrize(
    ("name", "value"),
    [("count", True), ("count", 1.0), ("share", True), ("share", "1"), ("chosen", 1), ("chosen", 0.0)],
)
def test_a_number_is_no_truth_and_a_truth_no_number(name: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=f"{name} is {value!r}; it must be"):
        from_plain(Numbers, {name: value})


def test_a_whole_number_is_a_number() -> None:
    found = from_plain(Numbers, {"share": 1})
    assert (found.share, type(found.share)) == (1.0, float)

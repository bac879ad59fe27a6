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

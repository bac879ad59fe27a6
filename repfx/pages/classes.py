"""How a classifier does class by class: right answers, and what is taken for what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from repfx.training.evaluation import Evaluation

SHADES = 7
_MOST_IN_MATRIX = 25
_MOST_PAIRS = 15


@dataclass(frozen=True)
class ClassRow:
    """A class: its number of test images, the share of them that is predicted right, and the class that it is taken for most often."""

    name: str
    images: int
    right: float
    mistaken: str


@dataclass(frozen=True)
class Cell:
    """The number of images of one class for which another was predicted, and a shade from 0 to 6 by their share of the class."""

    count: int
    shade: int


@dataclass(frozen=True)
class Classes:
    """The classes that have test images.

    Args:
        rows: the classes, the one with the fewest right answers first.
        names: names of the classes, in their order.
        matrix: a row for each true class with a cell for each predicted one; empty if there are too many classes to be seen at once.
        pairs: true class, predicted class and number of images, of the most frequent mistakes.
    """

    rows: Sequence[ClassRow]
    names: Sequence[str]
    matrix: Sequence[Sequence[Cell]]
    pairs: Sequence[tuple[str, str, int]]


def classes_of(found: Evaluation) -> Classes:
    """Read the classes from an evaluation."""
    totals = found.confusion.sum(1).tolist()
    mistaken: dict[str, str] = {}
    for true, predicted, count in found.confused:
        mistaken.setdefault(true, f"{predicted} ({count})")
    rows = [
        ClassRow(name, total, found.by_class[name], mistaken.get(name, ""))
        for name, total in zip(found.labels, totals)
        if total
    ]
    used = [place for place, total in enumerate(totals) if total or found.confusion[:, place].any()]
    matrix: list[list[Cell]] = []
    if len(used) <= _MOST_IN_MATRIX:
        matrix = [[_cell(int(found.confusion[true, place]), totals[true]) for place in used] for true in used]
    by_share = sorted(rows, key=lambda row: row.right)
    return Classes(by_share, [found.labels[place] for place in used], matrix, found.confused[:_MOST_PAIRS])


def _cell(count: int, total: int) -> Cell:
    """Return a cell. Shade 0 is for no image, so that one mistake among many is seen."""
    share = count / total if total else 0.0
    return Cell(count, min(SHADES - 1, 1 + int(share * (SHADES - 1))) if count else 0)

"""`grid`: a table of coloured squares, as SVG to be put into a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from repfx.pages.chart import add_text

_LETTER, _GAP, _MARGIN, _SLANT = 6.6, 2, 8, 0.71


@dataclass(frozen=True)
class Square:
    """One square of a grid.

    Args:
        title: what it says in words, for the tooltip.
        text: what it shows.
        style: its CSS class: ``more``, ``less`` or ``none``.
        strength: how much of its colour it has, from 0 to 1.
    """

    title: str
    text: str = ""
    style: str = "more"
    strength: float = 1.0


def grid(
    rows: Mapping[str, Mapping[str, Square]], columns: Sequence[str], label: str, *, size: tuple[int, int] = (46, 20)
) -> str:
    """Draw a grid, as SVG.

    Args:
        rows: squares by row and column. A column that a row lacks stays empty.
        columns: names of the columns, from left to right.
        label: a description, for screen readers.
        size: width and height of a square.
    """
    wide, high = size
    left = _MARGIN + _LETTER * max(map(len, rows), default=0) + 6
    top = _MARGIN + _LETTER * _SLANT * max(map(len, columns), default=0) + 12
    over = _LETTER * _SLANT * max(map(len, columns), default=0)
    width, height = left + wide * len(columns) + over, top + high * len(rows) + _MARGIN
    box = {"class": "picture", "viewBox": f"0 0 {width:.0f} {height:.0f}", "role": "img", "aria-label": label}
    svg = Element("svg", {**box, "width": f"{width:.0f}"})
    for place, name in enumerate(columns):
        x, y = left + wide * (place + 0.5), top - 6
        add_text(svg, "tick", x, y, name).set("transform", f"rotate(-45 {x:.1f} {y:.1f})")
    for line, (name, squares) in enumerate(rows.items()):
        y = top + high * line
        add_text(svg, "tick end", left - 6, y + high / 2 + 4, name)
        for place, column in enumerate(columns):
            if column in squares:
                _draw(svg, squares[column], left + wide * place, y, wide - _GAP, high - _GAP)
    return ElementTree.tostring(svg, encoding="unicode", method="html")


def _draw(svg: Element, square: Square, x: float, y: float, width: float, height: float) -> None:
    shape = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
    rect = SubElement(svg, "rect", {"class": square.style, "fill-opacity": f"{square.strength:.2f}", **shape})
    SubElement(rect, "title").text = square.title
    if square.text:
        add_text(svg, "mid", x + width / 2, y + height / 2 + 4, square.text)

"""Curves over the epochs of a run, one panel beneath the other, with what was changed when: SVG to be put into a page.

Colours and fonts are the page's: each shape has a class and no colour of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from repfx.pages.changes import changes_of
from repfx.pages.columns import columns_of
from repfx.pages.scale import Scale, round_marks, span
from repfx.pages.strips import Sign, strips
from repfx.training.history import Epoch

WIDTHS = {"narrow": 340, "middle": 660, "wide": 1060}
_LEFT, _RIGHT, _TITLE, _PANEL, _GAP, _STRIP, _AXIS = 68, 62, 24, 128, 22, 22, 34
_SIGN_ROOM, _HIT_ROOM, _RULE_ROOM, _DOT_ROOM = 34, 4, 12, 9


@dataclass(frozen=True)
class Line:
    """One curve: its name, its value in each epoch, and its class, by which the page draws it."""

    name: str
    values: tuple[float | None, ...]
    style: str = "first"
    stepped: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves with one axis.

    Args:
        text: how a value is written.
        from_zero: whether the axis begins at 0.
        reference: a value to compare with, by its name.
    """

    title: str
    lines: tuple[Line, ...]
    text: Callable[[float], str]
    from_zero: bool = True
    reference: tuple[str, float] | None = None

    @property
    def values(self) -> list[float]:
        """All that is to be seen."""
        found = [value for line in self.lines for value in line.values if value is not None]
        return found + ([self.reference[1]] if self.reference and found else [])


@dataclass(frozen=True)
class Frame:
    """Where the panels stand, and the scale of their common axis."""

    width: int
    x: Scale
    tops: tuple[float, ...]

    @property
    def bottom(self) -> float:
        return self.tops[-1] + _PANEL


def chart(panels: Sequence[Panel], epochs: Sequence[Epoch], label: str, size: str = "wide") -> str:
    """Panels that have values, as SVG.

    Args:
        epochs: of the run; each line has as many values.
        label: what it is, for those who don't see it.
        size: of `WIDTHS`; the page shows the one for which there is room.
    """
    panels = [panel for panel in panels if panel.values]
    width = WIDTHS[size]
    x = Scale(epochs[0].epoch, epochs[-1].epoch, _LEFT, width - _RIGHT)
    tops = tuple(_TITLE + index * (_PANEL + _GAP + _TITLE) for index in range(len(panels)))
    frame = Frame(width, x, tops)
    rows = strips(epochs, (width - _LEFT - _RIGHT) // _SIGN_ROOM)
    height = frame.bottom + _STRIP * len(rows) + _AXIS
    svg = Element(
        "svg", {"class": f"at-{size}", "viewBox": f"0 0 {width} {height:g}", "role": "img", "aria-label": label}
    )
    _rules(svg, frame, epochs)
    for panel, top in zip(panels, tops):
        _panel(svg, frame, panel, top, epochs)
    for index, (name, signs) in enumerate(rows.items()):
        _strip(svg, frame, frame.bottom + _STRIP * (index + 1), name, signs)
    _axis(svg, frame, frame.bottom + _STRIP * len(rows) + 16)
    _hits(svg, frame, panels, epochs)
    return ElementTree.tostring(svg, encoding="unicode", method="html")


def _panel(svg: Element, frame: Frame, panel: Panel, top: float, epochs: Sequence[Epoch]) -> None:
    low, high = span(panel.values, from_zero=panel.from_zero)
    y = Scale(low, high, top + _PANEL, top + 6)
    for mark in round_marks(low, high, 4):
        _line(svg, "grid", _LEFT, y(mark), frame.width - _RIGHT, y(mark))
        _text(svg, "tick end", _LEFT - 7, y(mark) + 4, panel.text(mark) if mark else "0")
    _text(svg, "title", _LEFT, top - 9, panel.title)
    if len(panel.lines) > 1:
        _legend(svg, frame, panel, top)
    if panel.reference is not None:
        name, value = panel.reference
        _line(svg, "reference", _LEFT, y(value), frame.width - _RIGHT, y(value))
        _text(svg, "note", frame.width - _RIGHT + 6, y(value) + 4, name)
    for line in panel.lines:
        _curve(svg, frame, line, y, epochs)
    _ends(svg, frame, panel, y)


def _curve(svg: Element, frame: Frame, line: Line, y: Scale, epochs: Sequence[Epoch]) -> None:
    points = [(frame.x(epoch.epoch), y(value)) for epoch, value in zip(epochs, line.values) if value is not None]
    if not points:
        return
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (left, _), (right, height) in pairwise(points):
        step = f"H{(left + right) / 2:.1f}V{height:.1f}H{right:.1f}"
        path += step if line.stepped else f"L{right:.1f} {height:.1f}"
    SubElement(svg, "path", {"class": f"curve {line.style}", "d": path})
    room = (frame.width - _LEFT - _RIGHT) / max(len(points) - 1, 1)
    if room >= _DOT_ROOM and not line.stepped:
        for left, height in points:
            SubElement(
                svg, "circle", {"class": f"dot {line.style}", "cx": f"{left:.1f}", "cy": f"{height:.1f}", "r": "2.5"}
            )


def _ends(svg: Element, frame: Frame, panel: Panel, y: Scale) -> None:
    """The last value of each curve beside its end; where they would meet, further apart."""
    taken = [] if panel.reference is None else [y(panel.reference[1]) + 4]
    for line in panel.lines:
        values = [value for value in line.values if value is not None]
        if values:
            place = y(values[-1]) + 4
            while any(abs(place - other) < 13 for other in taken):
                place += 13 if place >= max(taken) else -13
            taken.append(place)
            _text(svg, f"last {line.style}", frame.width - _RIGHT + 6, place, panel.text(values[-1]))


def _legend(svg: Element, frame: Frame, panel: Panel, top: float) -> None:
    right = float(frame.width - _RIGHT)
    for line in reversed(panel.lines):
        _text(svg, "note end", right, top - 9, line.name)
        right -= 7.2 * len(line.name) + 4
        _line(svg, f"curve {line.style}", right - 22, top - 13, right, top - 13)
        right -= 34


def _rules(svg: Element, frame: Frame, epochs: Sequence[Epoch]) -> None:
    """A line through all panels wherever something was changed, unless there would be too many."""
    changed = [epoch.epoch for epoch in epochs if changes_of(epoch)]
    if len(changed) * _RULE_ROOM <= frame.width:
        for epoch in changed:
            _line(svg, "change", frame.x(epoch), frame.tops[0], frame.x(epoch), frame.bottom + 4)


def _strip(svg: Element, frame: Frame, bottom: float, name: str, signs: Sequence[Sign]) -> None:
    _text(svg, "tick end", _LEFT - 15, bottom - 2, name)
    for sign in signs:
        place = fmean(map(frame.x, sign.epochs))
        SubElement(_text(svg, f"sign {name}", place, bottom - 2, sign.text), "title").text = sign.title


def _axis(svg: Element, frame: Frame, bottom: float) -> None:
    first, last = int(frame.x.low), int(frame.x.high)
    for mark in round_marks(first, last, max(4, (frame.width - _LEFT - _RIGHT) // 70), whole=True):
        _text(svg, "tick mid", frame.x(mark), bottom, str(int(mark)))
    _text(svg, "tick end", _LEFT - 15, bottom, "epoch")


def _hits(svg: Element, frame: Frame, panels: Sequence[Panel], epochs: Sequence[Epoch]) -> None:
    """Invisible columns that tell their epoch's numbers to whoever points at them."""
    room = frame.width - _LEFT - _RIGHT
    columns = columns_of(epochs, room // _HIT_ROOM)
    half = room / max(len(columns) - 1, 1) / 2
    places = {epoch.epoch: index for index, epoch in enumerate(epochs)}
    for column in columns:
        epoch = column.last.epoch
        told = [
            f"{line.name}: {panel.text(value)}"
            for panel in panels
            for line in panel.lines
            if (value := line.values[places[epoch]]) is not None
        ]
        left = max(frame.x(epoch) - half, _LEFT)
        shape = {"class": "hit", "x": f"{left:.1f}", "y": f"{frame.tops[0]:g}"}
        right = min(frame.x(epoch) + half, frame.width - _RIGHT)
        shape |= {"width": f"{max(right - left, 1):.1f}", "height": f"{frame.bottom - frame.tops[0]:g}"}
        SubElement(SubElement(svg, "rect", shape), "title").text = "\n".join([f"epoch {epoch}", *told])


def _line(svg: Element, style: str, left: float, top: float, right: float, bottom: float) -> None:
    SubElement(svg, "path", {"class": style, "d": f"M{left:.1f} {top:.1f}L{right:.1f} {bottom:.1f}"})


def _text(svg: Element, style: str, left: float, bottom: float, text: str) -> Element:
    found = SubElement(svg, "text", {"class": style, "x": f"{left:.1f}", "y": f"{bottom:.1f}"})
    found.text = text
    return found

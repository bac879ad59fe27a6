"""`chart`: curves over the epochs of a run and signs for the structure changes, as SVG to be put into a page.

The panels stand one beneath the other. Colours and fonts come from the page: each shape has a class and no colour of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from repfx.pages.changes import changes_of
from repfx.pages.columns import Column, columns_of
from repfx.pages.scale import Scale, Unit, round_marks, span, spread, unit_for
from repfx.pages.strips import Sign, strips
from repfx.training.runs.history import Epoch

_COLOURS = 6
WIDTHS = {"narrow": 340, "middle": 660, "wide": 1060}
_LEFT, _RIGHT, _TITLE, _PANEL, _GAP, _STRIP, _AXIS = 68, 82, 24, 128, 22, 22, 34
_SIGN_ROOM, _HIT_ROOM, _RULE_ROOM, _DOT_ROOM, _END_ROOM = 34, 2, 12, 9, 13


def style_of(place: int) -> str:
    """Return the CSS classes of the curve of a run, or of several that belong together, by its place among them.

    >>> style_of(0), style_of(7)
    ('run1', 'run2 thin')
    """
    return f"run{place % _COLOURS + 1}" + (" thin" if place >= _COLOURS else "")


@dataclass(frozen=True)
class Line:
    """One curve of a panel.

    Args:
        name: the name in the legend and in tooltips.
        values: one value for each epoch, None where it is unknown.
        style: the CSS class by which the page draws the curve.
        stepped: whether the value changes in a step halfway between two epochs, not along a straight line.
    """

    name: str
    values: tuple[float | None, ...]
    style: str = "first"
    stepped: bool = False

    @property
    def known(self) -> list[float]:
        """The values that are known."""
        return [value for value in self.values if value is not None]


@dataclass(frozen=True)
class Panel:
    """Curves that share one vertical axis.

    Args:
        title: the text above the panel.
        lines: the curves.
        units: units from small to large. The whole panel has one of them: the one that fits its greatest value.
        from_zero: whether the axis begins at 0.
        reference: name and value of a horizontal line to compare the curves with.
        named: whether the panel has a legend of its own, if it has several curves.
    """

    title: str
    lines: tuple[Line, ...]
    units: tuple[Unit, ...]
    from_zero: bool = True
    reference: tuple[str, float] | None = None
    named: bool = True

    @property
    def values(self) -> list[float]:
        """All values that the panel shows; the reference counts only if a curve has values."""
        found = [value for line in self.lines for value in line.known]
        return found + ([self.reference[1]] if self.reference and found else [])

    @property
    def unit(self) -> Unit:
        """The unit of the axis and of all values that the panel tells."""
        return unit_for(self.values, self.units)


@dataclass(frozen=True)
class Frame:
    """Layout of the panels.

    Args:
        width: width of the picture.
        x: the common horizontal scale, from epochs to places.
        tops: the top edge of each panel.
    """

    width: int
    x: Scale
    tops: tuple[float, ...]

    @property
    def bottom(self) -> float:
        return self.tops[-1] + _PANEL


def chart(panels: Sequence[Panel], epochs: Sequence[Epoch], label: str, size: str = "wide") -> str:
    """Draw the panels that have values, as SVG.

    Args:
        panels: all panels, from top to bottom.
        epochs: the epochs of the run; each line must have one value for each of them.
        label: a description of the chart, for screen readers.
        size: a key of `WIDTHS`. The page holds one chart for each width, and shows the one that fits.
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
    for mark in round_marks(low / panel.unit.size, high / panel.unit.size, 4):
        height = y(mark * panel.unit.size)
        add_line(svg, "grid", _LEFT, height, frame.width - _RIGHT, height)
        add_text(svg, "tick end", _LEFT - 7, height + 4, panel.unit.mark(mark))
    add_text(svg, "title", _LEFT, top - 9, panel.title)
    if panel.named and len(panel.lines) > 1:
        _legend(svg, frame, panel, top)
    if panel.reference is not None:
        height = y(panel.reference[1])
        add_line(svg, "reference", _LEFT, height, frame.width - _RIGHT, height)
    for line in panel.lines:
        _curve(svg, frame, line, y, epochs)
    _ends(svg, frame, panel, y, top)


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
        dots = "".join(f"M{left:.1f} {height:.1f}h0" for left, height in points)
        SubElement(svg, "path", {"class": f"dots {line.style}", "d": dots})


def _ends(svg: Element, frame: Frame, panel: Panel, y: Scale, top: float) -> None:
    """Write the last value of each curve beside the panel, and the name of the reference. Texts that would overlap are moved apart."""
    found = [
        (f"last {line.style}", values[-1], panel.unit.text(values[-1]))
        for line in panel.lines
        if (values := line.known)
    ]
    if panel.reference is not None:
        name, value = panel.reference
        found.append(("note", value, name))
    heights = spread([y(value) for _, value, _ in found], _END_ROOM, top + 6, top + _PANEL)
    for (style, _, text), height in zip(found, heights):
        add_text(svg, style, frame.width - _RIGHT + 6, height + 4, text)


def _legend(svg: Element, frame: Frame, panel: Panel, top: float) -> None:
    right = float(frame.width - _RIGHT)
    for line in reversed(panel.lines):
        add_text(svg, "note end", right, top - 9, line.name)
        right -= 7.2 * len(line.name) + 4
        add_line(svg, f"curve {line.style}", right - 22, top - 13, right, top - 13)
        right -= 34


def _rules(svg: Element, frame: Frame, epochs: Sequence[Epoch]) -> None:
    """Draw a vertical line through all panels at each epoch with a change, unless the lines would stand too close together."""
    changed = [epoch.epoch for epoch in epochs if changes_of(epoch)]
    if len(changed) * _RULE_ROOM <= frame.width:
        for epoch in changed:
            add_line(svg, "change", frame.x(epoch), frame.tops[0], frame.x(epoch), frame.bottom + 4)


def _strip(svg: Element, frame: Frame, bottom: float, name: str, signs: Sequence[Sign]) -> None:
    add_text(svg, "tick end", _LEFT - 15, bottom - 2, name)
    for sign in signs:
        place = fmean(map(frame.x, sign.epochs))
        SubElement(add_text(svg, f"sign {name}", place, bottom - 2, sign.text), "title").text = sign.title


def _axis(svg: Element, frame: Frame, bottom: float) -> None:
    first, last = int(frame.x.low), int(frame.x.high)
    for mark in round_marks(first, last, max(4, (frame.width - _LEFT - _RIGHT) // 70), whole=True):
        add_text(svg, "tick mid", frame.x(mark), bottom, str(int(mark)))
    add_text(svg, "tick end", _LEFT - 15, bottom, "epoch")


def _hits(svg: Element, frame: Frame, panels: Sequence[Panel], epochs: Sequence[Epoch]) -> None:
    """Add invisible columns whose tooltips give the numbers of an epoch. Charts of many curves get wider columns."""
    room = frame.width - _LEFT - _RIGHT
    columns = columns_of(epochs, room // (_HIT_ROOM + sum(len(panel.lines) for panel in panels)))
    half = room / max(len(columns) - 1, 1) / 2
    places = {epoch.epoch: index for index, epoch in enumerate(epochs)}
    for column in columns:
        told = [text for panel in panels for line in panel.lines if (text := _told(panel, line, column, places))]
        if not told:
            continue
        epoch = column.last.epoch
        left = max(frame.x(epoch) - half, _LEFT)
        shape = {"class": "hit", "x": f"{left:.1f}", "y": f"{frame.tops[0]:g}"}
        right = min(frame.x(epoch) + half, frame.width - _RIGHT)
        shape |= {"width": f"{max(right - left, 1):.1f}", "height": f"{frame.bottom - frame.tops[0]:g}"}
        SubElement(SubElement(svg, "rect", shape), "title").text = "\n".join([f"epoch {epoch}", *told])


def _told(panel: Panel, line: Line, column: Column, places: Mapping[int, int]) -> str | None:
    """Return the last value of a curve in a column, as text, with its epoch where that isn't the column's last one."""
    for each in reversed(column.epochs):
        value = line.values[places[each.epoch]]
        if value is not None:
            since = "" if each is column.last else f" (epoch {each.epoch})"
            return f"{line.name}: {panel.unit.text(value)}{since}"
    return None


def add_line(svg: Element, style: str, left: float, top: float, right: float, bottom: float) -> None:
    """Add a line of a CSS class to a picture."""
    SubElement(svg, "path", {"class": style, "d": f"M{left:.1f} {top:.1f}L{right:.1f} {bottom:.1f}"})


def add_text(svg: Element, style: str, left: float, bottom: float, text: str) -> Element:
    """Add a text of a CSS class to a picture."""
    found = SubElement(svg, "text", {"class": style, "x": f"{left:.1f}", "y": f"{bottom:.1f}"})
    found.text = text
    return found

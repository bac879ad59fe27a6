"""`accuracy_chart`: accuracy over the values of an option, or over a cost, as SVG to be put into a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from repfx.pages.chart import WIDTHS, add_line, add_text
from repfx.pages.scale import COUNTS, SHARES, Scale, Unit, round_marks, span, unit_for
from repfx.training.sweep import text_of

_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT, _ROOM = 68, 62, 14, 44, 300, 7.2
_FAR = 20  # from this ratio of the greatest value to the least on, an axis is logarithmic
_HIT = 9


@dataclass(frozen=True)
class Dot:
    """Runs at one place of an axis.

    Args:
        place: the place, in the axis' own numbers.
        told: what the place stands for, as text.
        accuracies: the accuracy of each run, from 0 to 1.
    """

    place: float
    told: str
    accuracies: tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """Dots of one colour.

    Args:
        name: what they have in common.
        style: the CSS classes by which the page draws them.
        joined: whether a line joins their means, in the order of their places.
    """

    name: str
    style: str
    dots: tuple[Dot, ...]
    joined: bool = True


@dataclass(frozen=True)
class Axis:
    """A horizontal axis: its title, and what is marked on it by place."""

    title: str
    marks: tuple[tuple[float, str], ...]


def places_of(values: Sequence[Any]) -> list[float]:
    """Return a place for each value of an option: its own number, its logarithm if the numbers lie far apart, or else its position.

    >>> places_of([2, 1]), places_of([0.01, 1, 0.1]), places_of(["dbb", "acb"])
    ([2.0, 1.0], [-2.0, 0.0, -1.0], [0.0, 1.0])
    """
    if not all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) for value in values
    ):
        return [float(place) for place in range(len(values))]
    numbers = [float(value) for value in values]
    if min(numbers) > 0 and max(numbers) >= _FAR * min(numbers):
        return [math.log10(number) for number in numbers]
    return numbers


def axis_of_option(title: str, values: Sequence[Any]) -> Axis:
    """Return the axis of an option, on which all its values are marked."""
    return Axis(title, tuple(sorted(zip(places_of(values), map(text_of, values)))))


def axis_of_counts(title: str, counts: Sequence[float]) -> Axis:
    """Return an axis of counts, such as multiply-adds, with round marks."""
    unit: Unit = unit_for(counts, COUNTS)
    marks = round_marks(min(counts) / unit.size, max(counts) / unit.size, 6)
    return Axis(title, tuple((mark * unit.size, unit.mark(mark)) for mark in marks))


def accuracy_chart(axis: Axis, series: Sequence[Series], label: str, size: str = "wide") -> str:
    """Draw accuracy over an axis: a dot for each run, and a line through the means of each series that is joined.

    Args:
        series: at least one, with at least one dot.
        label: a description of the chart, for screen readers.
        size: a key of `WIDTHS`.
    """
    width = WIDTHS[size]
    places = [dot.place for one in series for dot in one.dots]
    x = Scale(min(places), max(places), _LEFT + 12, width - _RIGHT)
    low, high = span([value for one in series for dot in one.dots for value in dot.accuracies], from_zero=False)
    y = Scale(low, high, _TOP + _HEIGHT, _TOP + 6)
    height = _TOP + _HEIGHT + _BOTTOM
    box = {"class": f"at-{size}", "viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label}
    svg = Element("svg", box)
    (unit,) = SHARES
    for mark in round_marks(low / unit.size, high / unit.size, 6):
        add_line(svg, "grid", _LEFT, y(mark * unit.size), width - _RIGHT, y(mark * unit.size))
        add_text(svg, "tick end", _LEFT - 7, y(mark * unit.size) + 4, unit.mark(mark))
    _marks(svg, axis, x, width)
    for one in series:
        _series(svg, one, x, y)
    for one in series:
        _tooltips(svg, one, x, y)
    return ElementTree.tostring(svg, encoding="unicode", method="html")


def _marks(svg: Element, axis: Axis, x: Scale, width: int) -> None:
    """Mark the axis. A mark that would overlap the one before it is left out."""
    end = -math.inf
    for place, text in axis.marks:
        if len(text) > 24:
            text = f"{text[:23]}…"
        middle, half = min(max(x(place), _LEFT), width - _RIGHT), _ROOM * len(text) / 2
        if middle - half > end:
            add_line(svg, "grid", middle, _TOP + _HEIGHT, middle, _TOP + _HEIGHT + 5)
            add_text(svg, "tick mid", middle, _TOP + _HEIGHT + 19, text)
            end = middle + half
    add_text(svg, "tick mid", (_LEFT + width - _RIGHT) / 2, _TOP + _HEIGHT + 38, axis.title)


def _series(svg: Element, one: Series, x: Scale, y: Scale) -> None:
    if one.joined:
        _line(svg, one, x, y)
    runs = [(x(dot.place), y(value)) for dot in one.dots for value in dot.accuracies]
    dots = "".join(f"M{left:.1f} {height:.1f}h0" for left, height in runs)
    SubElement(svg, "path", {"class": f"dots {one.style}", "d": dots})


def _line(svg: Element, one: Series, x: Scale, y: Scale) -> None:
    means = [(x(dot.place), y(fmean(dot.accuracies))) for dot in sorted(one.dots, key=lambda dot: dot.place)]
    line = "L".join(f"{left:.1f} {height:.1f}" for left, height in means)
    SubElement(svg, "path", {"class": f"curve {one.style}", "d": f"M{line}"})


def _tooltips(svg: Element, one: Series, x: Scale, y: Scale) -> None:
    for dot in one.dots:
        mean = fmean(dot.accuracies)
        shape = {"x": x(dot.place) - _HIT, "y": y(mean) - _HIT, "width": 2 * _HIT, "height": 2 * _HIT}
        rect = SubElement(svg, "rect", {"class": "hit", **{name: f"{number:.1f}" for name, number in shape.items()}})
        told = ", ".join(SHARES[0].text(value) for value in dot.accuracies)
        about = [one.name] if one.name else []
        SubElement(rect, "title").text = "\n".join([*about, dot.told, f"mean {SHARES[0].text(mean)} of {told}"])

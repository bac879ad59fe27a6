"""The charts of a page: units, what is drawn of whom, and the values that a reader gets by pointing at a curve."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from repfx.pages.chart import WIDTHS, Line, Panel, chart
from repfx.pages.run_charts import cost_chart, learning_chart
from repfx.pages.scale import COUNTS, NUMBERS, SHARES, TIMES, Unit, spread, unit_for
from repfx.pages.structure_map import structure_map
from repfx.training.runs.history import Epoch


def shapes(picture: object, style: str) -> list[Element]:
    """The shapes of a chart that have a class, in the order in which they are drawn."""
    return [each for each in ElementTree.fromstring(str(picture)).iter() if style in each.get("class", "").split()]


def ticks(picture: object) -> list[str]:
    return [str(each.text) for each in shapes(picture, "tick") if "end" in each.attrib["class"].split()]


def tooltips(picture: object) -> list[list[str]]:
    return [str(each[0].text).splitlines() for each in shapes(picture, "hit")]


def of(values: Sequence[float | None], units: tuple[Unit, ...], size: str = "wide") -> str:
    epochs = [Epoch(number) for number in range(len(values))]
    return chart([Panel("a panel", (Line("one", tuple(values)),), units)], epochs, "label", size)


@pytest.mark.parametrize(
    ("values", "units", "unit"),
    [
        ([2.0, 200.0], TIMES, "min"),
        ([0.4, 1.7], TIMES, "s"),
        ([1.0, 0.9e6, 1.8e6], COUNTS, "M"),
        ([0.2, 0.98], SHARES, "%"),
        ([0.99985, 0.9999], SHARES, "%"),
    ],
)
@pytest.mark.parametrize("size", WIDTHS)
def test_an_axis_has_one_unit_and_round_marks(
    values: list[float], units: tuple[Unit, ...], unit: str, size: str
) -> None:
    marks = [mark for mark in ticks(of(values, units, size)) if mark not in ("0", "epoch")]
    assert marks
    assert all(re.fullmatch(rf"[\d.]+ {unit}", mark) for mark in marks), marks
    assert len(set(marks)) == len(marks)


def test_a_unit_is_the_largest_that_a_value_reaches() -> None:
    assert [unit_for([value], TIMES).name for value in (0.5, 1.0, 59.0, 60.0, 3600.0)] == ["ms", "s", "s", "min", "h"]


def test_places_that_are_moved_apart_keep_their_order_and_stay_inside() -> None:
    places = [90.0, 89.0, 100.0, 3.0, 88.0]
    found = spread(places, 13, 0, 100)
    assert sorted(range(5), key=found.__getitem__) == sorted(range(5), key=places.__getitem__)
    assert min(after - before for before, after in pairwise(sorted(found))) >= 13 - 1e-9
    assert (min(found), max(found)) == (3, 100)
    assert spread([50.0] * 20, 13, 0, 100) == pytest.approx([5 * number for number in range(1, 21)])


EPOCHS = (
    Epoch(0, accuracy=0.1, macs=100, parameters=7),
    *(Epoch(number, 1 / number, 0.5, seconds=2.0, macs=300, parameters=9) for number in range(1, 5)),
)


def test_curves_of_cost_begin_with_the_first_epoch_of_training() -> None:
    picture = cost_chart(EPOCHS)[-1]
    begins = {float(str(each.get("d"))[1:].split()[0]) for each in shapes(picture, "curve")}
    (first,) = {float(str(each.get("x"))) for each in shapes(picture, "mid") if each.text == "1"}
    assert begins == {first}
    assert len(shapes(picture, "reference")) == 2
    assert [each.text for each in shapes(picture, "note")] == ["plain", "plain"]


def test_pointing_at_an_epoch_gives_the_values_of_all_curves() -> None:
    found = tooltips(learning_chart(EPOCHS)[-1])
    assert found[0] == ["epoch 0", "accuracy: 10 %"]
    assert found[2] == ["epoch 2", "accuracy: 50 %", "loss: 0.5"]
    assert len(found) == len(EPOCHS)
    assert [told[0] for told in tooltips(cost_chart(EPOCHS)[-1])] == ["epoch 1", "epoch 2", "epoch 3", "epoch 4"]


@pytest.mark.parametrize("size", WIDTHS)
def test_a_curve_of_rare_values_tells_each_of_them(size: str) -> None:
    values = [number / 1000 if number % 60 == 7 else None for number in range(600)]
    told = "\n".join(line for lines in tooltips(of(values, NUMBERS, size)) for line in lines)
    found = dict(re.findall(r"one: (\S+) \(epoch (\d+)\)", told))
    assert {number: float(value) for value, number in found.items()} == {
        str(number): pytest.approx(value, rel=5e-3) for number, value in enumerate(values) if value is not None
    }


@pytest.mark.parametrize("size", WIDTHS)
def test_the_last_value_has_room_beside_the_chart(size: str) -> None:
    (last,) = shapes(of([5400.0, 90.0, 4.47], TIMES[:3], size), "last")
    assert last.text == "0.0745 min"
    assert (
        float(last.attrib["x"]) + 7.4 * len(last.text) <= WIDTHS[size]
    )  # a letter of the bold 12 px font takes 7.4 px


def test_the_columns_to_point_at_cover_the_chart() -> None:
    found = shapes(of([0.5] * 50, NUMBERS), "hit")
    edges = [(float(each.attrib["x"]), float(each.attrib["width"])) for each in found]
    assert all(abs(left + width - after) < 0.3 for (left, width), (after, _) in pairwise(edges))


def test_each_square_of_the_map_says_what_it_is() -> None:
    epochs = [Epoch(0), Epoch(1), Epoch(2, blocks={"0": {"origin": 1.0, "1x1": None}})]
    (site,) = structure_map(epochs).sites
    assert all(cell.title for row in site.rows for cell in row.cells)
    assert [cell.title for cell in site.cells] == ["epoch 0: 0 branches", "epoch 1: 0 branches", "epoch 2: 1 branch"]
    assert [cell.title for cell in site.rows[1].cells] == [
        "epoch 0: no such branch",
        "epoch 1: no such branch",
        "epoch 2: no γ",
    ]

"""The parts of a page by themselves: scales, marks, classes of γ, factors and sums."""

from __future__ import annotations

import pytest

from repfx.pages.forms import Form
from repfx.pages.scale import Scale, round_marks, span
from repfx.pages.strips import strips
from repfx.pages.structure_map import LEVELS, level_of, structure_map
from repfx.pages.summary import cost_tiles
from repfx.passes.drop import Drop
from repfx.training.runs.history import Epoch


def test_a_scale_maps_its_ends_to_places() -> None:
    x = Scale(2.0, 6.0, 100.0, 180.0)
    assert [x(value) for value in (2, 3, 6)] == [100, 120, 180]
    upwards = Scale(0.0, 1.0, 50.0, 10.0)
    assert [upwards(value) for value in (0, 0.25, 1)] == [50, 40, 10]
    assert Scale(3.0, 3.0, 0.0, 8.0)(3) == 4


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(0, 1, [0, 0.5, 1]), (0, 4, [0, 2, 4]), (3, 11, [4, 6, 8, 10]), (-1, 1, [-1, 0, 1]), (7, 7, [7])],
)
def test_marks_are_round_and_reach_both_ends(low: float, high: float, marks: list[float]) -> None:
    assert round_marks(low, high, 4) == pytest.approx(marks)


def test_a_span_begins_at_zero_if_that_is_asked_for() -> None:
    assert span([2.0, 5.0], from_zero=True) == (0, 5)
    assert span([2.0, 5.0], from_zero=False) == (2, 5)


@pytest.mark.parametrize("place", range(len(LEVELS)))
def test_a_limit_belongs_to_the_class_above_it(place: int) -> None:
    assert level_of(LEVELS[place]) == place + 1
    assert level_of(LEVELS[place] * 0.999) == place


def test_a_form_is_so_many_times_another_one() -> None:
    assert Form("a", macs=6).times(Form("b", macs=4), "macs") == 1.5
    assert Form("a", macs=6).times(Form("b"), "macs") is None
    assert Form("a", macs=6).times(None, "macs") is None


EPOCHS = (
    Epoch(0, macs=100, parameters=5),
    Epoch(1, macs=150, seconds=2.0, actions=(Drop("a", "1x1"), Drop("a", "1xk"))),
    Epoch(2, macs=250, seconds=4.0, actions=(Drop("b", "1x1"),)),
    Epoch(3, macs=100, seconds=6.0),
)


def test_the_cost_of_a_training_is_that_of_all_its_epochs() -> None:
    found = {tile.label: (tile.value, tile.note) for tile in cost_tiles(EPOCHS)}
    assert found["MACs of training"][0] == "1.67 ×"
    assert found["Largest"] == ("250", "MACs, first in epoch 2")
    assert found["Time"] == ("12 s", "4 s an epoch, mean")


def test_a_sign_counts_all_changes_of_its_column() -> None:
    assert [sign.text for sign in strips(EPOCHS, 10)["dropped"]] == ["×2", "×1"]
    (together,) = strips(EPOCHS, 2)["dropped"]
    assert together.text == "×3"
    assert together.title == "dropped: 2 after epoch 1, 1 after epoch 2"


def test_a_column_shows_what_left_in_any_of_its_epochs() -> None:
    gammas = {"a": {"origin": 1.0, "1x1": 0.1, "1xk": 0.2}}
    long = [Epoch(0, blocks=gammas)]
    long += [Epoch(number, blocks=gammas if number < 2 else {"a": {"origin": 1.0}}) for number in range(1, 101)]
    long[1] = Epoch(1, blocks=gammas, actions=(Drop("a", "1x1"), Drop("a", "1xk")))
    found = structure_map(long)
    assert found.step > 1
    (site,) = found.sites
    signs = {row.name: [cell.sign for cell in row.cells if cell.sign] for row in site.rows}
    assert signs == {"origin": [], "1x1": ["×"], "1xk": ["×"]}

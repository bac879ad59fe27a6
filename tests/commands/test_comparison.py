"""The page that compares several runs: true to their files, and to how far each of them is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from repfx.blocks.spec import BranchSpec
from repfx.errors import InvalidInput
from repfx.pages.changes import structure_after
from repfx.pages.compared_runs import short_names
from repfx.pages.comparison_page import COMPARISON, write_comparison_page
from repfx.pages.run_page import write_run_page
from repfx.passes.drop import Drop
from repfx.passes.expand import Expand
from repfx.passes.fuse import Fuse
from repfx.records.journal import Action
from repfx.records.number_text import percent
from repfx.training.run_folder import HISTORY, METRICS, RECIPE, REPORT, RunFolder
from repfx.training.runs.history import Epoch, History
from tests.commands.test_page_charts import shapes
from tests.commands.test_pages import Page, stands_alone
from tests.recorded_run import long_history

_BLOCKS = {"0": {"origin": 1.0, "1x1": 0.5, "1xk": 0.1}, "3": {"origin": 1.0, "1x1": 0.5}}


def leave(folder: Path, epochs: int, recipe: str = "", metrics: Mapping[str, Any] | None = None, **last: Any) -> Path:
    """Leave the files of a short run in a folder. `last` changes its last epoch."""
    folder.mkdir(parents=True)
    found = [Epoch(0, accuracy=0.125, macs=100, parameters=5, blocks=_BLOCKS)]
    found += [Epoch(n, 1 / n, n / 16, seconds=2.0, macs=300, parameters=9, blocks=_BLOCKS) for n in range(1, epochs)]
    values = {"loss": 1 / epochs, "accuracy": epochs / 16, "seconds": 2.0, "macs": 300, "parameters": 9}
    found.append(Epoch(epochs, **{**values, "blocks": _BLOCKS, **last}))
    (folder / HISTORY).write_text(History(tuple(found)).to_json())
    if recipe:
        (folder / RECIPE).write_text(recipe)
    if metrics is not None:
        (folder / METRICS).write_text(json.dumps(metrics))
    return folder


def metrics(fused: float, **others: Any) -> dict[str, Any]:
    costs = {name: {"parameters": 7, "macs": 2000, "latency": 0.002} for name in ("plain", "expanded", "fused")}
    return {"accuracy": {"expanded": 0.75, "fused": fused}, "cost": costs, **others}


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Two finished runs, of which one has 8 bits, and one that is still training."""
    int8 = {"losses": [0.5], "accuracy": {"ptq": 0.5, "qat": 0.625}, "flips": {}, "file_error": 0.0}
    recipe = 'spec = "{}"\n[training]\nepochs = 4\nlearning_rate = {}\n'
    return [
        leave(tmp_path / "runs/a/out", 4, recipe.format("dbb", 0.1), metrics(0.75, int8=int8)),
        leave(tmp_path / "runs/<b>/out", 8, recipe.format("acb", 0.1), metrics(0.25), actions=(Drop("0", "1xk"),)),
        leave(tmp_path / "runs/c/out", 2, recipe.format("dbb", "0.2\nnote = '</td><script>'")),
    ]


@pytest.fixture
def page(three: list[Path], tmp_path: Path) -> Page:
    return Page(write_comparison_page(three, tmp_path / "page.html"))


def table_rows(page: Page, head: str) -> dict[str, list[str]]:
    """The rows beneath the row that begins with `head`, by their first cell, as long as they have as many cells."""
    rows = [[" ".join(cell.split()) for cell in row] for row in page.rows]
    (start,) = [place for place, row in enumerate(rows) if row[0] == head and len(row) == 4]
    found: dict[str, list[str]] = {}
    for row in rows[start + 1 :]:
        if len(row) != len(rows[start]) or row[0] == "site":
            break
        found[row[0]] = row[1:]
    return found


def test_the_page_of_one_run_has_rows_for_its_files_in_8_bits(tmp_path: Path) -> None:
    int8 = {"losses": [0.5], "accuracy": {"ptq": 0.5, "qat": 0.625}, "flips": {"ptq": 9, "qat": 4}, "file_error": 0.0}
    run = leave(tmp_path / "run", 4, metrics=metrics(0.75, int8=int8))
    found = Page(write_run_page(RunFolder(run), tmp_path / "page.html"))
    rows = {row[0]: row[1:4] for row in found.rows if row and "8 bits" in row[0]}
    assert rows == {"8 bits, rounded": [percent(0.5), "9", "–"], "8 bits, trained": [percent(0.625), "4", "–"]}
    assert "in 8 bits from the fused form's" in " ".join(found.words)


def test_the_page_stands_alone_and_builds_no_model(page: Page, three: list[Path]) -> None:
    stands_alone(page)
    assert page.path.stat().st_size < 150_000
    assert not any((folder / REPORT).exists() for folder in three)
    assert "a, <b>, c" in page.words


def test_results_stand_side_by_side(page: Page) -> None:
    (heads,) = [row for row in page.rows if row and row[0] == "training form"]
    forms = ["training form", "fused"]
    assert heads == [*forms, "8 bits, rounded", "8 bits, trained", *forms * 3, "time"]
    costs = ["2 k", "2 k", "7", "7", "2 ms", "2 ms"]
    rows = {" ".join(row[0].split()): row[1:] for row in page.rows if len(row) == len(heads) + 1 and row[0] != "run"}
    assert rows == {
        "a 4 epochs": ["75.00 %", "75.00 %", "50.00 %", "62.50 %", *costs, "8 s"],
        "<b> 8 epochs": ["75.00 %", "25.00 %", "–", "–", *costs, "16 s"],
        "c 2 epochs, not finished": ["12.50 %", "–", "–", "–", "300", "–", "9", "–", "–", "–", "4 s"],
    }


def test_only_keys_of_the_recipes_that_differ_are_listed(page: Page) -> None:
    assert table_rows(page, "key") == {
        "spec": ["dbb", "acb", "dbb"],
        "training.learning_rate": ["0.1", "0.1", "0.2"],
        "training.note": ["–", "–", "</td><script>"],
    }


def test_sites_with_the_same_branches_in_all_runs_share_a_row(page: Page, tmp_path: Path) -> None:
    assert table_rows(page, "site") == {"0": ["1x1, 1xk", "1x1", "1x1, 1xk"], "3": ["1x1"] * 3}
    folders = [leave(tmp_path / name, 2, blocks={site: {"origin": 1.0, "1x1": 0.1} for site in "34"}) for name in "xy"]
    folders.append(leave(tmp_path / "z", 2, blocks={}))
    assert table_rows(Page(write_comparison_page(folders, tmp_path / "p.html")), "site") == {
        "3, 4": ["1x1", "1x1", "–"]
    }


def test_each_run_has_one_curve_a_chart_in_its_own_style_and_with_its_own_values(page: Page) -> None:
    pictures = re.findall(r"<svg class=\"at-.*?</svg>", page.path.read_text(), re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        curves = [each.attrib["class"] for each in shapes(picture, "curve")]
        assert curves == ["curve run1", "curve run2", "curve run3"] * 2
        told = [str(each[0].text).splitlines() for each in shapes(picture, "hit")]
        assert told[0] == ["epoch 0", "a: 12.5 %", "<b>: 12.5 %", "c: 12.5 %"]
        assert told[2] == [
            "epoch 2",
            *(f"{name}: 12.5 %" for name in ("a", "<b>", "c")),
            "a: 0.5",
            "<b>: 0.5",
            "c: 0.5",
        ]
        assert told[-1] == ["epoch 8", "<b>: 50 %", "<b>: 0.125"]
    keys = [attributes["class"] for tag, attributes in page.elements if tag == "path" and "d" in attributes]
    assert keys.count("curve run1") >= 2


def test_runs_that_left_little_are_shown_as_far_as_they_are(tmp_path: Path) -> None:
    begun, other = tmp_path / "begun", leave(tmp_path / "other", 3)
    begun.mkdir()
    (begun / HISTORY).write_text(History(()).to_json())
    page = Page(write_comparison_page([begun, other], tmp_path / "page.html"))
    stands_alone(page)
    assert "begun 0 epochs, not finished" in page.text
    assert "There are no two recipes to compare." in page.text
    (other / HISTORY).unlink()
    (other / METRICS).write_text(json.dumps(metrics(0.5)))
    page = Page(write_comparison_page([begun, other], tmp_path / "page.html"))
    assert "No run has kept a history." in page.text
    assert "Training" not in page.words


@pytest.mark.slow
def test_long_runs_give_a_small_page_with_their_last_values(tmp_path: Path) -> None:
    history = long_history(sites=3, epochs=600)
    for place in range(6):
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / HISTORY).write_text(History(history.epochs[: 601 - 7 * place]).to_json())
    page = Page(write_comparison_page([tmp_path / str(place) for place in range(6)], tmp_path / "page.html"))
    assert page.path.stat().st_size < 150_000
    accuracy = history.epochs[600 - 7 * 5].accuracy
    assert accuracy is not None
    assert f"{100 * accuracy:.4g} %" in page.words


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/r/a/seed0", "/r/b/seed0"], ["a", "b"]),
        (["/r/a/1/out", "/r/a/2/out", "/r/b/1/out"], ["a/1", "a/2", "b/1"]),
        (["/r/a", "/r/a/baseline"], ["a", "a/baseline"]),
        (["/r/x/a", "/r/a"], ["x/a", "a"]),
    ],
)
def test_names_of_runs_are_what_differs_in_their_paths(paths: list[str], names: list[str]) -> None:
    assert short_names([Path(path) for path in paths]) == names


@pytest.mark.parametrize(
    ("actions", "branches"),
    [
        ((Drop("0", "1x1"),), {"0": ("1xk",), "3": ("1x1",)}),
        ((Fuse("0"),), {"3": ("1x1",)}),
        ((Fuse("0"), Expand("0", (BranchSpec("kx1"),))), {"0": ("kx1",), "3": ("1x1",)}),
        ((Expand("7", (BranchSpec("1x1", name="own"),)),), {"0": ("1x1", "1xk"), "3": ("1x1",), "7": ("own",)}),
    ],
)
def test_the_last_structure_is_the_one_after_the_last_changes(
    actions: tuple[Action, ...], branches: dict[str, tuple[str, ...]]
) -> None:
    assert structure_after(Epoch(3, blocks=_BLOCKS, actions=actions)) == branches
    assert structure_after(Epoch(0, blocks=_BLOCKS, actions=actions)) == {"0": ("1x1", "1xk"), "3": ("1x1",)}


def test_what_can_not_be_compared_is_refused_and_an_older_page_stays(three: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("older")
    (three[2] / METRICS).write_text('{"int8": {"accuracy": {"qat": "high"}}}')
    many = [leave(tmp_path / str(number), 1) for number in range(13)]
    for paths, message in (
        ([three[0], three[1] / ".." / ".." / "a" / "out"], "is given twice"),
        (many, "compares 2 to 12 runs, and 13 are given"),
        (three[:1], "compares 2 to 12 runs, and 1 are given"),
        ([three[0], tmp_path], "holds no training run"),
        (three, "none that `repfx train` wrote"),
    ):
        with pytest.raises(InvalidInput, match=re.escape(message)):
            write_comparison_page(paths, page)
    assert page.read_text() == "older"


def test_the_command_compares_several_runs(  # type: ignore[no-untyped-def]
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repfx_command
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = repfx_command("report", *three)
    assert (outcome.code, outcome.out) == (0, f"The page is {COMPARISON}.\n")
    assert "3 training runs, compared" in Page(tmp_path / COMPARISON).text
    outcome = repfx_command("report", *three[:2], "--out", "page.html", "--json")
    assert json.loads(outcome.out) == {"page": "page.html"}
    refused = repfx_command("report", three[0], three[0])
    assert (refused.code, refused.err.count("\n")) == (2, 1)

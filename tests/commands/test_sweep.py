"""`repfx sweep`: what it trains and keeps, what it says of what fails, its table and its page."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from repfx.errors import Interrupted, InvalidInput
from repfx.pages.sweep_chart import axis_of_counts, axis_of_option
from repfx.pages.sweep_page import charts_of, write_sweep_page
from repfx.training import sweep as sweeps
from repfx.training.loop import Watcher
from repfx.training.run_folder import CHECKPOINT, HISTORY, METRICS
from repfx.training.runs.history import Epoch, History
from repfx.training.sweep import SWEEP, Result, Row, Sweep, run_sweep
from tests.commands.test_page_charts import shapes
from tests.commands.test_pages import CHROMIUM, Page, fits, stands_alone

TINY = f"{Path(__file__).parents[1] / 'tiny.py'}:net"
SMALL = ["--model", TINY, "--set", "image_size=8", "--epochs", "1"]
RATE = "training.learning_rate"


def leave(out: Path, accuracy: float, macs: float = 300, fused: int = 100, seconds: float = 2.0) -> None:
    """Leave the files of a finished run of two epochs, whose training form has `macs` on the mean."""
    out.mkdir(parents=True, exist_ok=True)
    cost = {name: {"parameters": 7, "macs": fused, "latency": 0.002} for name in ("plain", "expanded", "fused")}
    found = {
        "losses": [1.0],
        "test_images": 8,
        "accuracy": {"fused": accuracy},
        "flips": {},
        "max_error": {},
        "cost": cost,
    }
    (out / METRICS).write_text(json.dumps({**found, "onnx_latency": 0.1}))
    epochs = (
        Epoch(0, macs=1),
        Epoch(1, 1.0, seconds=seconds, macs=int(macs) - 50),
        Epoch(2, 1.0, seconds=seconds, macs=int(macs) + 50),
    )
    (out / HISTORY).write_text(History(epochs).to_json())


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the training: a rate over 1 fails, and each other run gets its rate for an accuracy."""
    seen: list[str] = []

    def run(experiment: Any, watcher: Watcher) -> None:
        seen.append(str(experiment.out))
        if (experiment.out / METRICS).exists():
            seen.pop()
            return
        rate = experiment.training.learning_rate
        if rate > 1:
            raise RuntimeError("out of memory.\nTried to allocate")
        leave(experiment.out, rate + experiment.training.seed / 64)

    monkeypatch.setattr(sweeps, "run", run)
    return seen


def test_each_combination_of_values_and_seeds_is_one_run(
    trained: list[str], tmp_path: Path, repfx_command: Any
) -> None:
    over = ["--over", f"{RATE}=0.25,0.5", "--over", 'spec=["dbb", ["1x1", "1xk"]]', "--seeds", 2]
    outcome = repfx_command("sweep", *SMALL, *over, "--out", tmp_path, "--json")
    assert outcome.code == 0
    asked = Sweep.read(tmp_path)
    assert len(trained) == len(asked.points) == len({point.folder for point in asked.points}) == 8
    assert {point.folder for point in asked.points} >= {
        "learning_rate=0.25/spec=dbb/seed=0",
        "learning_rate=0.5/spec=dbb/seed=1",
    }
    for point in asked.points:
        values = asked.values(point)
        assert (values["training"]["learning_rate"], values["spec"]) == (point.values[RATE], point.values["spec"])
        assert (values["training"]["seed"], values["training"]["epochs"]) == (point.seed, 1)
    rows = json.loads(outcome.out)["rows"]
    assert [row["accuracies"] for row in rows] == [[0.25, 0.265625]] * 2 + [[0.5, 0.515625]] * 2
    assert rows[0]["accuracy"] == statistics.fmean([0.25, 0.265625])
    assert rows[0]["deviation"] == statistics.stdev([0.25, 0.265625])
    assert (rows[0]["macs"], rows[0]["fused_macs"], rows[0]["seconds"]) == (300, 100, 4)


def test_what_fails_is_named_and_the_rest_goes_on(trained: list[str], tmp_path: Path, repfx_command: Any) -> None:
    command = ["sweep", *SMALL, "--over", f"{RATE}=0.25,2,0.5", "--out", tmp_path]
    outcome = repfx_command(*command)
    assert outcome.code == 2
    assert "1 run of 3 failed. learning_rate = 2, seed 0: out of memory." in outcome.err
    assert "50.00%" in outcome.out
    assert [point.problem for point in Sweep.read(tmp_path).points] == [None, "out of memory.", None]
    trained.clear()
    assert repfx_command(*command).code == 2
    assert trained == [str(tmp_path / "learning_rate=2/seed=0")]
    assert json.loads(repfx_command(*command, "--json").out)["failed"] == {"learning_rate=2/seed=0": "out of memory."}


def test_more_values_join_the_sweep_and_other_options_don_t(
    trained: list[str], tmp_path: Path, repfx_command: Any
) -> None:
    begun = ["sweep", *SMALL, "--out", tmp_path, "--over"]
    assert repfx_command(*begun, f"{RATE}=0.25,0.5").code == 0
    assert repfx_command(*begun, f"{RATE}=0.75", "--seeds", 2).code == 0
    assert len(trained) == 4
    assert [point.folder for point in Sweep.read(tmp_path).points] == [
        "learning_rate=0.25/seed=0",
        "learning_rate=0.5/seed=0",
        "learning_rate=0.75/seed=0",
        "learning_rate=0.75/seed=1",
    ]
    before = (tmp_path / SWEEP).read_bytes()
    for arguments, message in (
        (["training.weight_decay=0,1"], f"was begun over {RATE}, and now it is over training.weight_decay"),
        ([f"{RATE}=0.25", "--set", "training.clip=1"], "was begun with training.clip = None, and now it is 1"),
    ):
        refused = repfx_command(*begun, *arguments)
        assert (refused.code, refused.out) == (2, "")
        assert message in refused.err
    assert (tmp_path / SWEEP).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to choose from"),
        (["--over", "training.learning_rat=1,2"], "no key in training 'learning_rat'; did you mean 'learning_rate'?"),
        (["--over", "trainin.learning_rate=1,2"], "no key 'trainin'; did you mean 'training'?"),
        (
            ["--set", "schedule.name=dyrep", "--over", "schedule.interva=1,2"],
            "no option of DyRep 'interva'; did you mean 'interval'?",
        ),
        (["--over", "schedule.name=dyrep,repam"], "no schedule 'repam'; did you mean 'repan'?"),
        (["--over", f"{RATE}=0.1,-1"], "learning_rate is -1"),
        (["--over", f"{RATE}=0.1,0.1"], "has the value 0.1 twice"),
        (["--over", f"{RATE}="], "has no values"),
        (["--over", RATE], "must be KEY=VALUE,VALUE"),
        (["--over", f"{RATE}=0.1", "--over", f"{RATE}=0.2"], "twice: give all its values together"),
        (["--over", "training.seed=0,1", "--seeds", 2], "leave --seeds out"),
        (["--over", "out=a,b"], "out can't be set in a recipe"),
        (["--over", "data=digits"], "data is 'digits'; it must be a table"),
    ],
)
def test_what_can_not_be_swept_is_refused_before_anything_is_trained(
    arguments: list[str], message: str, trained: list[str], tmp_path: Path, repfx_command: Any
) -> None:
    refused = repfx_command("sweep", *SMALL, "--out", tmp_path / "sweep", *arguments)
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert message in refused.err
    assert not trained
    assert not (tmp_path / "sweep").exists()


def test_seeds_can_be_an_option_and_a_code_in_a_file_needs_trust(
    trained: list[str], tmp_path: Path, repfx_command: Any
) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text(f'[model]\nname = "{TINY}"\n[training]\nseed = 5\n')
    refused = repfx_command("sweep", recipe, "--over", f"{RATE}=0.1", "--out", tmp_path / "x")
    assert "--trust" in refused.err
    assert not (tmp_path / "x").exists()
    assert repfx_command("sweep", recipe, "--trust", "--seeds", 2, "--out", tmp_path / "x").code == 0
    assert repfx_command("sweep", recipe, "--trust", "--over", "training.seed=8,9", "--out", tmp_path / "y").code == 0
    assert trained == [
        str(tmp_path / name) for name in ("x/seed=5", "x/seed=6", "y/training.seed=8", "y/training.seed=9")
    ]
    assert len(sweeps.rows_of(Sweep.read(tmp_path / "y"), tmp_path / "y")) == 2


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_the_terminal(
    columns: int, trained: list[str], tmp_path: Path, repfx_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    over = [
        "--over",
        f"{RATE}=0.25,2",
        "--over",
        'spec=[{"layer1.*": "acb", "layer2.*": ["1x1", "1xk", "identity"]}, "dbb"]',
    ]
    outcome = repfx_command("sweep", *SMALL, *over, "--seeds", 3, "--out", tmp_path)
    lines = outcome.out.splitlines()
    assert max(map(len, lines[:-3])) <= columns
    for text in ("learning_rate", "spec", "26.56%", "1.56%", "0 of 3", "300", "4 s"):
        assert any(text in line for line in lines), text
    assert "…" not in outcome.out
    assert max(map(len, repfx_command("sweep", "--help").out.splitlines())) <= columns


def test_an_interruption_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(experiment: Any, watcher: Watcher) -> None:
        raise Interrupted("interrupted in epoch 1")

    monkeypatch.setattr(sweeps, "run", run)
    with pytest.raises(Interrupted, match=r"in run 1 of 2: epochs = 1, seed 0. The same command continues it"):
        run_sweep(Sweep.over({}, {"training.epochs": [1, 2]}), tmp_path)
    assert len(Sweep.read(tmp_path).points) == 2


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"format": 1}',
        '{"format": 1, "recipe": {}, "keys": [], "points": [{"folder": "../x", "values": {}, "seed": 0}]}',
    ],
)
def test_a_malformed_sweep_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / SWEEP).write_text(text)
    with pytest.raises(InvalidInput, match="holds no sweep that `repfx sweep` wrote"):
        Sweep.read(tmp_path)


# --- the page ---------------------------------------------------------------------------------------------------------


def results(*accuracies: float, macs: float = 1.0) -> tuple[Result, ...]:
    return tuple(Result(accuracy, macs, 100, 2.0) for accuracy in accuracies)


def places(path: str) -> list[tuple[float, float]]:
    """The points that a path goes through."""
    found = []
    for part in path.replace("L", "M").split("M")[1:]:
        x, y = map(float, part.split("h")[0].split())
        found.append((x, y))
    return found


def test_a_chart_has_each_mean_and_each_run_at_its_place() -> None:
    rows = [
        Row({"a.budget": 10, "b.spec": "dbb"}, 2, results(0.5, 0.7, macs=2e6)),
        Row({"a.budget": 10, "b.spec": "acb"}, 2, results(0.4, macs=1e6)),
        Row({"a.budget": 30, "b.spec": "dbb"}, 2, results(0.9, 0.9, macs=5e6)),
        Row({"a.budget": 20, "b.spec": "dbb"}, 2, results(0.6, 0.8, macs=3e6)),
        Row({"a.budget": 40, "b.spec": "dbb"}, 2, ()),
    ]
    (first, series, pictures), (second, _, _), (third, (costs,), by_cost) = charts_of(["a.budget", "b.spec"], rows)
    assert (first, second, third) == ("budget", "spec", "MACs of training")
    assert [one.name for one in series] == ["spec = dbb", "spec = acb"]
    for picture in pictures:
        (curve, other), (dots, _) = shapes(picture, "curve"), shapes(picture, "dots")
        assert (curve.attrib["class"], other.attrib["class"]) == ("curve run1", "curve run2")
        means, runs = places(curve.attrib["d"]), places(dots.attrib["d"])
        left, middle, right = (x for x, _ in means)
        assert middle - left == pytest.approx(right - middle, abs=0.2)  # 10, 20 and 30
        ((alone, lowest),) = places(other.attrib["d"])
        assert alone == left
        heights = [(lowest - y) / (lowest - means[-1][1]) for _, y in means]  # from 0.4 to 0.9
        assert heights == pytest.approx([0.4, 0.6, 1.0], abs=2e-3)
        assert len(runs) == 6
        assert runs[0][1] + runs[1][1] == pytest.approx(2 * means[0][1], abs=0.2)
        told = [str(each[0].text) for each in shapes(picture, "hit")]
        assert told[0] == "spec = dbb\nbudget = 10\nmean 60 % of 50 %, 70 %"
        assert [str(each.text) for each in shapes(picture, "tick") if "mid" in each.attrib["class"]][:4] == [
            "10",
            "20",
            "30",
            "budget",
        ]
    assert [dot.place for dot in costs.dots] == [2e6, 1e6, 5e6, 3e6]
    (dots,) = shapes(by_cost[-1], "dots")
    assert not shapes(by_cost[-1], "curve")
    xs = [x for x, _ in places(dots.attrib["d"])]
    wanted = [0.25, 0.25, 0, 1, 1, 0.5, 0.5]  # 2 M, 1 M, 5 M and 3 M
    assert [(x - min(xs)) / (max(xs) - min(xs)) for x in xs] == pytest.approx(wanted, abs=1e-3)


def test_an_axis_marks_what_was_trained() -> None:
    assert axis_of_option("x", [0.1, 0.01, 1]).marks == ((-2.0, "0.01"), (-1.0, "0.1"), (0.0, "1"))
    assert axis_of_option("x", [2, 1]).marks == ((1.0, "1"), (2.0, "2"))
    assert axis_of_option("x", ["dbb", "acb", True]).marks == ((0.0, "dbb"), (1.0, "acb"), (2.0, "true"))
    assert axis_of_counts("x", [1e6, 2e6]).marks[0] == (1e6, "1 M")


def test_the_page_of_a_sweep_has_its_numbers_and_says_what_failed(
    trained: list[str], tmp_path: Path, repfx_command: Any
) -> None:
    begun = [
        "sweep",
        *SMALL,
        "--over",
        f"{RATE}=0.25,0.5,2",
        "--set",
        "data.crop=1.0",
        "--seeds",
        2,
        "--out",
        tmp_path / "<s>",
    ]
    assert repfx_command(*begun).code == 2
    outcome = repfx_command("report", tmp_path / "<s>", "--json")
    page = Page(Path(json.loads(outcome.out)["page"]))
    assert page.path == tmp_path / "<s>" / "report.html"
    stands_alone(page)
    assert page.row("0.25")[1:] == ["2", "25.78 %", "1.10 %", "300", "100", "4 s"]
    assert page.row("2")[1:] == ["0 of 2", "–", "", "–", "–", "–"]
    assert "learning_rate = 2, seed 1: out of memory." in page.text
    assert "2 more left nothing so far" in page.text
    assert "Accuracy over learning_rate" in page.words
    assert "Accuracy over MACs of training" not in page.words  # which are equal in all runs
    assert "Training" in page.words
    assert "<s>" in page.words


def test_a_sweep_that_has_not_begun_has_a_page(tmp_path: Path) -> None:
    Sweep.over({}, {RATE: [0.5, 1]}).write(tmp_path)
    page = Page(write_sweep_page(tmp_path, tmp_path / "page.html"))
    assert page.row("0.5")[1:3] == ["0 of 1", "–"]
    assert not [tag for tag, _ in page.elements if tag == "svg"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_of_a_sweep_does_not_scroll_sideways(width: int, tmp_path: Path) -> None:
    spec = {"layer1.*": "acb", "layer2.*": ["1x1", "1xk", "identity", "1x1-kxk"]}
    asked = Sweep.over({}, {RATE: [0.5, 0.25, 0.125], "spec": [spec, "dbb"]}, seeds=2)
    for place, point in enumerate(asked.points):
        leave(tmp_path / point.folder, place / 16, 1e9 * place + 1e6)
    asked.write(tmp_path)
    fits(write_sweep_page(tmp_path), width, tmp_path)


@pytest.mark.slow
def test_a_run_of_a_sweep_is_what_repfx_train_leaves(tmp_path: Path, repfx_command: Any) -> None:
    sweep = ["sweep", *SMALL, "--over", f"{RATE}=0.01,0.02", "--seeds", 1, "--out", tmp_path / "sweep"]
    assert repfx_command(*sweep, "--json").code == 0
    alone = ["train", *SMALL, "--learning-rate", 0.02, "--seed", 0, "--out", tmp_path / "alone", "--json"]
    assert repfx_command(*alone).code == 0
    ours, theirs = tmp_path / "sweep/learning_rate=0.02/seed=0", tmp_path / "alone"
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    assert (ours / CHECKPOINT).read_bytes() == (theirs / CHECKPOINT).read_bytes()
    (ours / METRICS).unlink()  # as if it had been killed before its end
    kept = (tmp_path / "sweep/learning_rate=0.01/seed=0" / METRICS).stat().st_mtime_ns
    assert repfx_command(*sweep, "--json").code == 0
    assert (ours / METRICS).is_file()
    assert (tmp_path / "sweep/learning_rate=0.01/seed=0" / METRICS).stat().st_mtime_ns == kept

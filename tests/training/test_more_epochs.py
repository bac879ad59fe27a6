"""The best epoch, an early end, and more epochs for a finished run."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from repfx.errors import Interrupted, InvalidInput, RepfxError
from repfx.training import experiment, loop
from repfx.training.experiment import Experiment, run
from repfx.training.learning_rate import share_of_rate
from repfx.training.loop import Step, Watcher
from repfx.training.models import ModelReference
from repfx.training.recipe import Recipe
from repfx.training.run_folder import BEST, CHECKPOINT, METRICS, MODEL, RECIPE, STATE, RunFolder
from repfx.training.runs.extension import goes_on
from tests.recorded_run import TINY

pytestmark = pytest.mark.usefixtures("quick_end")
STEPS = 3  # in an epoch of the digits


def asked(out: Path, epochs: int = 2, *, schedule: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    training = Recipe(epochs=epochs, batch_size=512, learning_rate=0.02, **changes)
    return Experiment(ModelReference(TINY), spec="1x1", training=training, schedule=schedule, image_size=8, out=out)


def going_on(job: Experiment, **changes: Any) -> Experiment:
    return replace(job, training=replace(job.training, **changes), resume=True)


def weights(folder: Path, name: str = CHECKPOINT) -> Tensor:
    parameters = RunFolder(folder, name).load(trust=True).state_dict().values()
    return torch.cat([each.detach().double().flatten() for each in parameters])


def rates(folder: Path) -> list[float]:
    history = RunFolder(folder).history
    assert history is not None
    return [epoch.learning_rate for epoch in history.epochs[1:] if epoch.learning_rate is not None]


@pytest.fixture
def accuracies(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The accuracies that the tests after each epoch return, in place of those that they measure."""
    found: list[float] = []
    monkeypatch.setattr(loop._Training, "_accuracy", lambda self, model: found.pop(0))
    return found


# --- the best epoch, and an early end ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_epoch_that_is_kept_is_fused(accuracies: list[float], tmp_path: Path) -> None:
    """At a constant rate, the model after two of three epochs is that of a run of two."""
    constant: dict[str, Any] = {"rates": "constant", "warm_up": 0.0}
    epochs = {}
    for name, count, keep in (("two", 2, "last"), ("last", 3, "last"), ("best", 3, "best"), ("both", 3, "both")):
        accuracies[:] = [0.5, 0.9, 0.9][:count]
        metrics = run(asked(tmp_path / name, count, keep=keep, **constant))
        assert metrics is not None
        epochs[name] = metrics.epoch
        assert bool(metrics.notes) == (keep == "best")
    assert epochs == {"two": 2, "last": 3, "best": 2, "both": 3}
    two, last = (weights(tmp_path / name) for name in ("two", "last"))
    assert not torch.equal(two, last)
    assert torch.equal(weights(tmp_path / "best"), two)
    assert torch.equal(weights(tmp_path / "both"), last)
    assert torch.equal(weights(tmp_path / "both", BEST), two)
    assert not (tmp_path / "last" / BEST).exists()
    assert RunFolder.at(tmp_path / "both" / BEST) == RunFolder(tmp_path / "both", BEST)


@pytest.mark.slow
def test_the_best_of_the_averaged_models_is_kept_over_an_interruption(
    accuracies: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[dict[str, int]] = []
    monkeypatch.setattr(
        loop, "save", lambda path, model, *rest, progress, **more: saved.append(progress) if path.name == BEST else None
    )
    accuracies += [0.9, 0.1, 0.8, 0.3, 0.7, 0.2]  # of the model and of its average, in turn
    loop.train(*inputs(), asked(tmp_path, 3, average=0.9, keep="best").training, best=tmp_path / BEST)
    assert saved == [{"epoch": 1}, {"epoch": 2}]


def inputs() -> tuple[Any, Any]:
    job = asked(Path())
    plain, _, data, _ = experiment._prepare(job)
    return plain, data


@pytest.mark.slow
def test_a_training_ends_once_nothing_gets_better(accuracies: list[float], tmp_path: Path) -> None:
    accuracies += [0.5, 0.9, 0.7, 0.9]
    job, told = asked(tmp_path / "out", 9, patience=2), list[str]()
    metrics = run(job, Watcher(on_notice=told.append))
    assert metrics is not None
    assert metrics.epoch == 4
    assert told == ["stopped after epoch 4: none of the last 2 was better than epoch 2, 90.00%"]
    for changes in ({}, {"patience": 1}):  # finished all the same
        assert run(going_on(job, **changes)) == metrics
    with pytest.raises(InvalidInput, match="its patience of 2 epochs ran out: give more --patience, or 0"):
        run(going_on(job, epochs=12))
    accuracies += [0.1, 0.2]
    metrics = run(going_on(job, epochs=9, patience=4))
    assert metrics is not None
    assert metrics.epoch == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": "best"}, "RepNAS is a search, which has found something only at its end: leave keep = 'best' out"),
        ({"patience": 2}, "leave patience = 2 out"),
    ],
)
def test_a_search_is_not_cut_short(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        run(asked(tmp_path / "out", 6, schedule={"name": "repnas"}, **changes))
    assert not (tmp_path / "out").exists()


def test_what_can_be_kept_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no choice of what to keep 'first'"):
        asked(tmp_path, keep="first")


# --- more epochs ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [None, "dyrep"])
def test_a_finished_run_goes_on_along_the_longer_curve(schedule: str | None, tmp_path: Path) -> None:
    """After two of two epochs, the third and fourth have the rates of a run of four; killed on the way, it ends the same."""
    options = None if schedule is None else {"name": schedule}
    for name in ("whole", "killed"):
        job = asked(tmp_path / name, 2, schedule=options, optimizer="SGD")
        first = run(job)
        assert first is not None
        kept = {each: (tmp_path / name / each).read_bytes() for each in (CHECKPOINT, MODEL)}
        longer = going_on(job, epochs=4)

        def on_step(step: Step) -> None:
            if step.number == 2 * STEPS + 1:
                signal.raise_signal(signal.SIGINT)

        if name == "killed":
            with pytest.raises(Interrupted, match="stopped in epoch 3 after step 1"):
                run(longer, Watcher(on_step=on_step))
            assert not (tmp_path / name / METRICS).exists()
            assert all((tmp_path / name / each).read_bytes() == text for each, text in kept.items())
            begun = RunFolder(tmp_path / name).recipe
            assert begun is not None
            assert begun["training"]["epochs"] == 4
        metrics = run(longer)
        assert metrics is not None
        assert (metrics.epoch, len(metrics.losses)) == (4, 4)
        assert metrics.losses[:2] == first.losses
        assert run(longer) == metrics  # finished again
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    last = [share_of_rate(2 * STEPS - 1, 2 * STEPS), *(share_of_rate(n * STEPS - 1, 4 * STEPS) for n in (3, 4))]
    assert rates(tmp_path / "whole")[1:] == pytest.approx([0.02 * share for share in last])
    if schedule:
        plan = [RunFolder(tmp_path / name).setup.schedule for name in ("whole", "killed")]
        fresh = asked(tmp_path / "other", 4, schedule=options)
        assert plan[0] == plan[1]
        assert plan[0] is not None
        assert experiment.schedule_of(fresh).until != plan[0]["until"]  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_schedule_of_a_longer_run_is_the_one_that_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = asked(tmp_path / "out", 2, schedule={"name": "dyrep"})
    run(job)
    seen: list[Any] = []

    def train(model: object, data: object, recipe: object, schedule: object, **rest: object) -> None:
        seen.append(schedule)
        raise RepfxError("enough.")

    monkeypatch.setattr(experiment, "train", train)
    for changes in ({"epochs": 8}, {"epochs": 9}):
        with pytest.raises(RepfxError, match="enough"):
            run(going_on(job, **changes))
    assert seen == [experiment.schedule_of(job)] * 2
    assert (tmp_path / "out" / METRICS).is_file()  # what failed before the training has changed nothing


@pytest.mark.slow
def test_a_run_of_a_version_that_knew_fewer_options_goes_on(tmp_path: Path) -> None:
    job = asked(tmp_path / "out")
    run(job)
    recipe = tmp_path / "out" / RECIPE
    lines = recipe.read_text().splitlines(keepends=True)
    kept = [
        line for line in lines if not line.startswith(("patience =", "keep =", "freeze =", "crop =", "pretrained ="))
    ]
    assert len(lines) == len(kept) + 5
    recipe.write_text("".join(kept))
    assert not goes_on(job.training, RunFolder(tmp_path / "out"))
    longer = run(going_on(job, epochs=3))
    assert longer is not None
    assert longer.epoch == 3
    recipe.write_text("".join(kept))
    with pytest.raises(InvalidInput, match=r"begun with training.keep = 'last', and now it is 'best'"):
        run(going_on(job, epochs=3, keep="best"))


@pytest.mark.slow
def test_what_can_not_go_on_says_so_and_stays(tmp_path: Path) -> None:
    job = asked(tmp_path / "out")
    run(job)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(
        InvalidInput, match="begun with 2 epochs, and now there are 1: a run that goes on may have more"
    ):
        run(going_on(job, epochs=1))
    with pytest.raises(InvalidInput, match=r"begun with training.keep = 'last', and now it is 'best'"):
        run(going_on(job, epochs=3, keep="best"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / STATE).unlink()
    with pytest.raises(InvalidInput, match=f"is finished and has no {STATE} or history.json to go on from"):
        run(going_on(job, epochs=3))
    assert json.loads((tmp_path / "out" / METRICS).read_text())["epoch"] == 2


@pytest.mark.slow
def test_a_search_that_is_over_does_not_go_on(tmp_path: Path) -> None:
    job = asked(tmp_path / "out", 4, schedule={"name": "random_search"})
    run(job)
    with pytest.raises(InvalidInput, match="the search random_search has closed with it"):
        run(going_on(job, epochs=6))


# --- a start that fails ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("older", [False, True])
def test_the_folder_of_a_start_that_fails_is_clean_again(
    older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: object, x: Tensor, y: Tensor) -> None:
        raise RuntimeError("out of memory")

    out = tmp_path / "runs" / "first"
    if older:
        out.mkdir(parents=True)
        (out / "notes.txt").write_text("mine")
    monkeypatch.setattr(loop._Training, "_step", step)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(asked(out, log_with="tensorboard"))
    assert [path.name for path in tmp_path.rglob("*")] == (["runs", "first", "notes.txt"] if older else [])

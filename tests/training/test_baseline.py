"""The plain model's run beside another one."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from repfx.errors import Interrupted, InvalidInput
from repfx.pages.run_page import write_run_page
from repfx.training.experiment import Experiment, run
from repfx.training.loop import Step, Watcher
from repfx.training.models import ModelReference
from repfx.training.recipe import Recipe
from repfx.training.run_folder import METRICS, RECIPE, RunFolder
from repfx.training.runs.baseline import require_comparable, verdict
from repfx.training.runs.metrics import Baseline, Metrics
from tests.recorded_run import TINY

pytestmark = pytest.mark.usefixtures("quick_end")


def asked(out: Path, **changes: Any) -> Experiment:
    training = Recipe(epochs=2, batch_size=512, learning_rate=0.02)
    job = Experiment(ModelReference(TINY), spec="1x1", training=training, image_size=8, out=out)
    return replace(job, **changes)


@pytest.mark.slow
def test_the_plain_model_is_trained_alike_and_shown_beside(tmp_path: Path) -> None:
    plain = run(asked(tmp_path / "plain", spec=[]))
    assert plain is not None
    out = tmp_path / "out"
    told: list[str] = []

    def on_step(step: Step) -> None:
        if step.number == 4 and (out / METRICS).is_file():  # that is, in the second epoch of the plain model
            signal.raise_signal(signal.SIGINT)

    job = asked(out, baseline="plain")
    with pytest.raises(
        Interrupted, match=f"stopped in epoch 2 after step 1; go on with: repfx train --resume --out {out}"
    ):
        run(job, Watcher(on_step=on_step, on_notice=told.append))
    assert told == ["now the plain model, trained alike, to compare with:"]
    metrics = run(replace(job, resume=True))
    assert metrics is not None
    assert metrics.accuracy["plain"] == plain.accuracy["fused"] != metrics.accuracy["fused"]
    assert metrics.top5["plain"] == plain.top5["fused"]
    assert metrics.baseline == Baseline(str(out / "baseline"))
    assert Metrics.from_dict(json.loads((out / METRICS).read_text())) == metrics
    named = run(asked(tmp_path / "named", baseline=str(tmp_path / "plain")))
    assert named is not None
    assert named.accuracy == metrics.accuracy
    text = write_run_page(RunFolder(out), trust=True).read_text()
    assert "By the branches" in text
    assert "trained alike, one run of each" in text

    longer = run(replace(asked(out, resume=True, baseline="plain"), training=replace(job.training, epochs=3)))
    assert longer is not None
    assert (longer.epoch, RunFolder(out / "baseline").metrics["epoch"]) == (3, 3)  # type: ignore[index]
    with pytest.raises(InvalidInput, match="isn't of a plain model: train one with --spec"):
        run(asked(tmp_path / "no", baseline=str(out)))
    with pytest.raises(InvalidInput, match="can't be compared: its image_size is 8, and here it is 9"):
        run(asked(tmp_path / "no", baseline=str(tmp_path / "plain"), image_size=9))
    values = {**job.values, "data": {**job.values["data"], "options": {"label": "fine"}}}
    with pytest.raises(InvalidInput, match=r"its data\.options\.label is None, and here it is 'fine'"):
        require_comparable(values, str(tmp_path / "plain"))
    recipe = tmp_path / "plain" / RECIPE  # an older version didn't know these options
    recipe.write_text("".join(line for line in recipe.open() if not line.startswith(("keep =", "crop ="))))
    other = run(asked(tmp_path / "other", baseline=str(tmp_path / "plain"), training=replace(job.training, epochs=1)))
    assert other is not None
    assert other.baseline == Baseline(str(tmp_path / "plain"), ("training.epochs",))
    run(asked(out, overwrite=True))
    assert not (out / "baseline").exists()


@pytest.mark.slow
def test_a_plain_model_does_not_begin_with_branches(tmp_path: Path) -> None:
    once = replace(asked(tmp_path).training, epochs=1)
    begun = tmp_path / "begun"
    run(asked(begun, training=once))
    with pytest.raises(InvalidInput, match="have branches, and a plain model can't begin from them: give weights of a"):
        run(asked(tmp_path / "out", training=once, weights=begun, baseline="plain"))
    assert not (tmp_path / "out").exists()
    run(asked(tmp_path / "tuned", training=once, weights=begun, spec=[]))
    with pytest.raises(InvalidInput, match="isn't of a plain model: the weights that it began from have branches"):
        run(asked(tmp_path / "out", training=once, baseline=str(tmp_path / "tuned")))


def metrics_of(fused: float, plain: float, differing: tuple[str, ...] = ()) -> Metrics:
    accuracy = {"fused": fused, "plain": plain}
    return Metrics([], 200, accuracy, {}, {}, {}, 0.0, baseline=Baseline("plain", differing))


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (
            metrics_of(0.75, 0.7),
            "gets 10 more test images right than the plain model, trained alike: +5.00 points on 70.00 %",
        ),
        (
            metrics_of(0.695, 0.7),
            "gets 1 fewer test image right than the plain model, trained alike: -0.50 points on 70.00 %",
        ),
        (metrics_of(0.7, 0.7), "gets as many test images right as the plain model"),
        (metrics_of(0.75, 0.7, ("training.epochs",)), "than the plain model, trained otherwise (training.epochs): +5"),
    ],
)
def test_what_branches_have_brought_is_told(metrics: Metrics, said: str) -> None:
    assert said in str(verdict(metrics))


def test_what_can_not_be_compared_is_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInput, match="the model is trained plain, so there is nothing to compare it with"):
        run(asked(tmp_path / "out", spec=[], baseline="plain"))
    with pytest.raises(InvalidInput, match="must be 'plain' or the folder of a run, and 'plane' holds none"):
        run(asked(tmp_path / "out", baseline="plane"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidInput, match="train the plain one in a run of its own"):
        run(asked(tmp_path / "out", baseline="plain"))
    assert not (tmp_path / "out").exists()

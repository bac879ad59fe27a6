"""Epochs with rounded numbers in a training run: their files and numbers, and that an interruption changes nothing."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from repfx.commands.tables import metrics_table
from repfx.errors import Interrupted, InvalidInput
from repfx.onnx.metadata import Metadata
from repfx.training.experiment import Experiment, run
from repfx.training.loop import Step, Watcher
from repfx.training.models import ModelReference
from repfx.training.recipe import AuxiliaryHead, QuantizationAware, Recipe
from repfx.training.run_folder import INT8, INT8_STATE, METRICS, MODEL, STATE, RunFolder
from repfx.training.runs.metrics import Cost, Int8, Metrics
from tests.recorded_run import TINY


def experiment(out: Path, **changes: Any) -> Experiment:
    return Experiment(
        model=ModelReference(TINY),
        spec="repvgg",
        training=Recipe(epochs=1, qat=QuantizationAware(2), **changes),
        image_size=8,
        out=out,
    )


def weights_in(path: Path) -> list[torch.Tensor]:
    onnx = pytest.importorskip("onnx")
    return [torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in onnx.load(path).graph.initializer]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_file_in_8_bits(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    whole = run(experiment(tmp_path / "whole"))
    stages: list[str] = []

    def stop(step: Step) -> None:
        if stages[-1] == "round" and step.number == 15:
            signal.raise_signal(signal.SIGINT)

    broken = experiment(tmp_path / "broken")
    with pytest.raises(
        Interrupted, match=r"^rounding stopped in epoch 2 after step \d; go on with: repfx train --resume"
    ):
        run(broken, Watcher(on_stage=stages.append, on_step=stop))
    resumed = run(replace(broken, resume=True))
    assert whole is not None
    assert resumed is not None
    assert whole.int8 is not None
    assert whole.int8 == resumed.int8
    ours, theirs = (weights_in(tmp_path / name / INT8) for name in ("whole", "broken"))
    assert len(ours) == len(theirs) > 4
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert len(whole.int8.losses) == 2
    assert {"ptq", "qat"} == set(whole.int8.accuracy) == set(whole.int8.flips)
    found = json.loads((tmp_path / "whole" / METRICS).read_text())
    assert Metrics.from_dict(found) == whole
    metadata = [Metadata.read(tmp_path / "whole" / name) for name in (MODEL, INT8)]
    assert metadata[0].labels == metadata[1].labels
    assert metadata[0].preprocessing == metadata[1].preprocessing
    left = {path.name for path in RunFolder(tmp_path / "broken").path.iterdir()}
    assert {name for name in left if "state" in name} == {STATE}  # with which a run goes on with more epochs


def test_more_epochs_after_an_interruption_of_rounding_begin_it_anew(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / INT8_STATE).touch()  # of the model after fewer epochs
    folder.go_on("")
    assert not (tmp_path / INT8_STATE).exists()


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repfx.training import experiment as module

    monkeypatch.setattr(module, "require_torchao", lambda: None)
    with pytest.raises(InvalidInput, match="2 processes were started, and epochs with rounding run in one"):
        module._require_rounding(experiment(tmp_path).training, 2)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"epochs": 1, "share": 0.0}, {"epochs": 1, "share": 2.0}])
def test_epochs_with_rounding_that_can_not_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="in qat, epochs is"):
        QuantizationAware(**options)


def test_rounding_is_trained_in_float32_at_a_small_rate() -> None:
    head = AuxiliaryHead("body")
    recipe = Recipe(
        epochs=9, learning_rate=0.5, average=0.9, auxiliary=head, drop_path=0.2, qat=QuantizationAware(3, 0.1)
    )
    found = recipe.with_rounding()
    assert (found.epochs, found.learning_rate, found.average, found.qat) == (3, 0.05, 0.0, None)
    assert (found.mixed_precision, found.auxiliary, found.drop_path) == ("no", None, 0.0)
    assert found.seed == recipe.seed


def test_the_table_of_a_run_with_rounding_fits_into_80_columns() -> None:
    forms = ("plain", "expanded", "fused", "onnxruntime")
    costs = {name: Cost(11_200_000, 92_800_000, 0.0123) for name in forms[:3]}
    shares, flips = dict.fromkeys(forms, 0.6873), dict.fromkeys(forms, 100)
    int8 = Int8([1.0], {"ptq": 0.25, "qat": 0.26}, {"ptq": 5, "qat": 10}, 0.0)
    metrics = Metrics([1.0], 10000, shares, flips, {}, costs, 0.0123, top5=shares, int8=int8)
    console = Console(width=80)
    with console.capture() as shown:
        console.print(metrics_table(metrics))
    assert "12.30 ms" in shown.get()
    assert "…" not in shown.get()

"""The arithmetic of the benchmarks of deployed and compiled models, and the files they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from benchmarks import compiled, deployment, launches
from repfx.blocks.block import RepBlock

RESULTS_FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"

# ---- deployment


def changed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The file with another bias, in place."""
    (bias,) = (each for each in model.graph.initializer if len(each.dims) == 1)
    bias.CopyFrom(onnx.numpy_helper.from_array(1 + onnx.numpy_helper.to_array(bias), bias.name))
    return model


def refused(model: onnx.ModelProto) -> onnx.ModelProto:
    raise ValueError("no such graph\n  in line 3")


@pytest.mark.slow
def test_an_optimizer_that_fails_or_changes_the_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = {"none": lambda model: model, "changed": changed, "refused": refused}
    monkeypatch.setattr(deployment, "OPTIMIZERS", optimizers)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    x = torch.randn(1, 3, 6, 5)
    unfused = deployment.exported(model, x, tmp_path / "unfused.onnx")
    none, other, failed = (deployment.attempt(name, unfused, x, model(x).detach()) for name in optimizers)
    assert isinstance(none, deployment.Candidate)
    assert (none.convs, none.convs_run) == (1, 1)
    assert none.error < 1e-6
    assert str(other).startswith("fails: the output is off by")
    assert failed == "fails: no such graph"


def test_committed_deployments_give_what_torch_gives() -> None:
    files = sorted(RESULTS_FOLDER.glob("deployment-*.json"))
    assert files
    for file in files:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        assert {row["form"] for row in rows} == {*deployment.FORMS, *deployment.OPTIMIZERS}
        assert {row["model"] for row in rows} == {subject.name for subject in deployment.SUBJECTS}
        measured = [row for row in rows if "problem" not in row]
        assert all(row["error"] < deployment.TOLERANCE for row in measured)
        assert all(row["low"] <= row["ratio"] <= row["high"] for row in measured)


# ---- compiled


def test_a_compiled_step_is_set_against_the_eager_one_turn_by_turn() -> None:
    row = compiled.as_row("dbb", first=9.5, graphs=1, eager=[1.0, 10.0, 2.0], compiled=[0.5, 5.0, 1.6])
    assert (row["ratio"], row["low"], row["high"]) == (0.5, 0.5, 0.8)
    assert (row["eager"], row["compiled"], row["compile"]) == (2.0, 1.6, 7.9)


@pytest.mark.parametrize("candidate", compiled.CANDIDATES)
def test_a_candidate_to_compile_is_what_it_is_called(candidate: str) -> None:
    blocks = [
        module
        for module in compiled.CANDIDATES[candidate](compiled.net((4, 8))).modules()
        if isinstance(module, RepBlock)
    ]
    assert bool(blocks) == (candidate != "plain")
    assert all(block.squeezed == ("squeezed" in candidate) for block in blocks)
    assert all(len(block.running) == 3 < len(block.paths) for block in blocks if "gated" in candidate)


def test_committed_steps_were_compiled_once() -> None:
    files = sorted(RESULTS_FOLDER.glob("compiled-*.json"))
    assert files
    for file in files:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        assert {row["candidate"] for row in rows} == set(compiled.CANDIDATES)
        assert {row["graphs"] for row in rows} == {1}
        assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows)


# ---- operations of a training step

# upper bounds, because versions of torch differ in some operations
MOST_OPERATIONS = {
    "plain": 190,
    "dbb, frozen, squeezed": 400,
    "dyrep, frozen, squeezed": 520,
    "orepa, squeezed": 450,
    "repvgg, frozen, squeezed": 250,
    "acb, frozen, squeezed": 270,
}


@pytest.mark.slow
@pytest.mark.parametrize("model", MOST_OPERATIONS)
def test_a_training_step_on_a_gpu_starts_few_operations(model: str) -> None:
    assert launches.operations(launches.Step(model, "meta", 2)) <= MOST_OPERATIONS[model]


def test_committed_counts_are_within_the_bounds_and_fewer_than_on_a_cpu() -> None:
    rows = {
        row["what"]: row for row in json.loads((RESULTS_FOLDER / "launches.json").read_text(encoding="utf-8"))["rows"]
    }
    for model, most in MOST_OPERATIONS.items():
        assert rows[model]["GPU"] <= min(most, rows[model]["CPU"])

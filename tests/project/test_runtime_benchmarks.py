"""The arithmetic of the benchmarks of deployed and compiled models, and the files they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torchvision
from torch import nn

import repfx
from benchmarks import compiled, deployment, launches, merging
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.cost import weights
from repfx.blocks.block import RepBlock
from repfx.testing import randomize_batch_norm, relative_error

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


# ---- which convs become one


def convs_in(model: nn.Module, block: type[nn.Module]) -> list[list[ConvSpec]]:
    return [merging.convs_of(each) for each in model.modules() if isinstance(each, block)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("MobileNetV2, linear blocks", torchvision.models.mobilenetv2.InvertedResidual),
        ("EfficientNet-B0, linear blocks", torchvision.models.efficientnet.MBConv),
    ],
)
def test_blocks_without_activations_become_one_conv_where_that_has_fewer_weights(name: str, block: Any) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(merging.NETS[name]().double()).eval()
    expected = 0
    for convs in convs_in(model, block):
        first, last = convs[0], convs[-1]
        (size,) = {size for conv in convs for size in conv.kernel_size} - {1}
        merged = size**2 * (first.in_channels + 1) * last.out_channels  # with a channel of ones
        expected += 1 if merged <= sum(map(weights, convs)) else len(convs)
    outside = len(merging.convs_of(model)) - sum(map(len, convs_in(model, block)))
    fused, x = repfx.fuse(model), torch.randn(2, 3, 64, 48, dtype=torch.float64)
    assert len(merging.convs_of(fused)) == outside + expected
    assert relative_error(fused(x), model(x)) < 1e-10


def test_committed_forms_by_latency_are_never_slower_beyond_chance() -> None:
    rows = json.loads((RESULTS_FOLDER / "merging-cpu.json").read_text(encoding="utf-8"))["rows"]
    chosen = [row for row in rows if row["form"] == merging.BY_LATENCY]
    assert {row["net"] for row in chosen} == set(merging.NETS)
    assert all(row["low"] <= 1 for row in chosen)


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

"""Files in 8 bits: what they compute, what the report says of each layer, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.errors import ExportError, InvalidInput, UnknownName
from repfx.onnx.quantization_report import QuantizationReport
from repfx.onnx.quantize import quantize_onnx
from tests.qat.nets import Joined, trained
from tests.qat.nets import X as NETS_X

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(96, 3, 10, 8, generator=GENERATOR) * torch.linspace(0.2, 1, 96).reshape(-1, 1, 1, 1)
Y = torch.randint(4, (96,), generator=GENERATOR)


def net() -> nn.Sequential:
    """Two convs and a linear layer. One channel of the second conv has weights 30 times as large as the others."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    with torch.no_grad():
        model.get_parameter("2.weight")[3] *= 30
    return model.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repfx.export_onnx(net(), tmp_path_factory.mktemp("onnx") / "net.onnx", X[:2]).path


@pytest.fixture(scope="module")
def report(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizationReport:
    return quantize_onnx(exported, tmp_path_factory.mktemp("int8") / "net.int8.onnx", [X], labelled=[(X, Y)])


def run(path: Path, x: Tensor) -> Tensor:
    """Run a file as it is written, without optimizations that depend on this machine's kernels."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def decibels(signal: Tensor, rounded: Tensor) -> float:
    signal, rounded = signal.double(), rounded.double()
    return 10 * math.log10(float(signal.square().sum() / (signal - rounded).square().sum()))


def in_8_bits(weight: Tensor, axis: int | None = None) -> Tensor:
    """Quantize a weight to 8 bits and back, with as many steps on both sides of zero, with one scale per index of `axis` or one for all."""
    largest = weight.abs().amax([each for each in range(weight.dim()) if each != axis], keepdim=True)
    scale = largest / 127
    return (weight / scale).round() * scale


def in_unsigned_8_bits(output: Tensor) -> Tensor:
    """Quantize outputs to 8 bits and back, by the range that holds them and zero."""
    low, high = min(float(output.min()), 0.0), max(float(output.max()), 0.0)
    scale = (high - low) / 255
    zero = round(-low / scale)
    return ((output / scale).round() + zero).clamp(0, 255).sub(zero) * scale


@pytest.mark.slow
def test_the_file_is_smaller_and_almost_the_same(report: QuantizationReport, exported: Path) -> None:
    assert [file.name for file in report.path.parent.iterdir()] == ["net.int8.onnx"]
    assert report.size == report.path.stat().st_size
    assert report.size_before == exported.stat().st_size
    model = onnx.load(report.path)
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= {node.op_type for node in model.graph.node}
    assert {each.data_type for each in model.graph.initializer if each.name.endswith("weight_quantized")} == {
        onnx.TensorProto.INT8
    }
    expected = net()(X).detach()
    assert 1e-4 < float((run(report.path, X) - expected).abs().max() / expected.abs().max()) < 0.05


def test_accuracy_is_that_of_both_files(report: QuantizationReport) -> None:
    before, after = net()(X).argmax(1), run(report.path, X).argmax(1)
    found = report.accuracy
    assert found is not None
    assert found.images == report.images == 96
    assert found.float32 == pytest.approx(float((before == Y).double().mean()))
    assert found.int8 == pytest.approx(float((after == Y).double().mean()))
    assert found.flips == int((before != after).sum())
    assert str(found) in str(report)


def test_each_layer_is_measured(report: QuantizationReport) -> None:
    model = net()
    assert [(layer.name, layer.operator) for layer in report.layers] == [("0", "Conv"), ("2", "Conv"), ("6", "Gemm")]
    outputs = {"0": model[:2](X), "2": model[:4](X), "6": model(X)}
    for layer in report.layers:
        weight, output = model.get_parameter(f"{layer.name}.weight").detach(), outputs[layer.name].detach()
        channels = weight.abs().flatten(1).amax(1)
        assert layer.weight_range == pytest.approx(float(channels.max()))
        assert layer.channel_spread == pytest.approx(float(channels.max() / channels.median()))
        assert layer.weight_sqnr == pytest.approx(decibels(weight, in_8_bits(weight, 0)), abs=0.01)
        assert (layer.low, layer.high) == pytest.approx((float(output.min()), float(output.max())), rel=1e-4)
        assert layer.range_sqnr == pytest.approx(decibels(output, in_unsigned_8_bits(output)), abs=0.1)
        assert layer.output_sqnr < layer.range_sqnr
        inner = output.flatten().quantile(torch.tensor([0.0005, 0.9995]))
        assert layer.share == pytest.approx(float(inner.diff() / (output.max() - output.min())), abs=0.01)
        assert layer.quantized
    assert report.layers[1].channel_spread > 20
    assert report.layers[2].output_sqnr == pytest.approx(decibels(model(X).detach(), run(report.path, X)), abs=0.1)


def test_one_scale_a_tensor_loses_more_and_the_first_weak_layer_is_named(
    tmp_path: Path, exported: Path, report: QuantizationReport
) -> None:
    coarse = quantize_onnx(exported, tmp_path / "net.onnx", [X], per_channel=False, bound=45)
    weight = net().get_parameter("2.weight").detach()
    assert coarse.layers[1].weight_sqnr == pytest.approx(decibels(weight, in_8_bits(weight)), abs=0.01)
    below = [layer.name for layer in coarse.layers if layer.output_sqnr < 45]
    assert coarse.weak is not None
    assert coarse.weak.name == below[0]
    assert f"first layer below 45 dB: {below[0]}" in str(coarse)
    assert dataclasses.replace(coarse, bound=0.0).weak is None


def test_a_layer_may_stay_in_float(tmp_path: Path, exported: Path) -> None:
    found = quantize_onnx(exported, tmp_path / "net.onnx", [X.split(20)[0]], keep_float=["2"], reduce_range=True)
    assert [layer.quantized for layer in found.layers] == [True, False, True]
    weight = net().get_parameter("2.weight").detach()
    stored = {each.name: each for each in onnx.load(found.path).graph.initializer}["2.weight"]
    assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(stored).copy()), weight)
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert values["layers"][1]["weight_sqnr"] is None
    assert values["accuracy"] is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_ranges_are_chosen_as_asked_for(tmp_path: Path, exported: Path, method: str) -> None:
    """A single outlier widens only the range that covers all values."""
    x = X.repeat(10, 1, 1, 1)
    x[-1, 0, 0, 0] = 5.0
    scales = []
    for name in ("minmax", method):
        path = quantize_onnx(exported, tmp_path / f"{name}.onnx", x.split(96), method=name).path
        constants = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
        scales.append(float(constants["input_scale"]))
    assert scales[0] == pytest.approx(5 / 255)
    assert scales[1] < 0.9 * scales[0]


def test_kernels_that_overflow_are_told_of(report: QuantizationReport) -> None:
    assert "without VNNI" not in str(dataclasses.replace(report, kernel_error=0.01))
    assert "12% off what the file says: without VNNI" in str(dataclasses.replace(report, kernel_error=0.12))


def nothing() -> Iterator[Tensor]:
    yield from ()


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no data": ({"calibrate": nothing()}, InvalidInput, "calibrate gave no batch: ranges are measured on real inputs"),
    "NaN": ({"calibrate": [X, X * math.nan]}, InvalidInput, "batch 1 of calibrate holds numbers that are not finite"),
    "shape": ({"calibrate": [X[:, :2]]}, InvalidInput, r"batch 0 .* is \[96, 2, 10, 8\], and the file takes input: fl"),
    "type": ({"calibrate": ["x"]}, InvalidInput, "batch 0 of calibrate is of type str"),
    "method": ({"method": "max"}, UnknownName, "no calibration method 'max'; did you mean 'minmax'"),
    "layer": ({"keep_float": ["3"]}, UnknownName, "no layer '3'. Known: 0, 2, 6|no layer '3'; did you mean"),
    "labels": ({"labelled": [(X, Y[:3])]}, InvalidInput, r"batch 0 of labelled has labels \[3\]"),
    "no labels": ({"labelled": []}, InvalidInput, "labelled gave no batch"),
    "labelled shape": ({"labelled": [(X[:, :2], Y)]}, InvalidInput, "batch 0 of labelled doesn't fit the file"),
    "no file": ({"source": "nowhere.onnx"}, InvalidInput, "there is no file 'nowhere.onnx'"),
    "folder": ({"target": "nowhere/net.onnx"}, InvalidInput, "there is no folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_quantized_is_refused_and_leaves_no_file(case: str, tmp_path: Path, exported: Path) -> None:
    changed, kind, message = REFUSED[case]
    (tmp_path / "net.onnx").write_text("the file from before")
    given: dict[str, Any] = {"source": exported, "target": tmp_path / "net.onnx", "calibrate": [X[:8]], **changed}
    if case == "folder":
        given["target"] = tmp_path / changed["target"]
    with pytest.raises(kind, match=message):
        quantize_onnx(given.pop("source"), given.pop("target"), given.pop("calibrate"), **given)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the file from before"]


def file_of(path: Path, *, operator: str = "Conv", opset: int = 13, dtype: str = "FLOAT", inputs: int = 1) -> Path:
    """Write a file of one node."""
    kind = getattr(onnx.TensorProto, dtype)
    weight = onnx.helper.make_tensor("w", kind, [2, 3, 1, 1], [1.0] * 6)
    node = onnx.helper.make_node(operator, ["input", "w"] if operator == "Conv" else ["input"], ["output"])
    taken = [onnx.helper.make_tensor_value_info(name, kind, [1, 3, 4, 4]) for name in ("input", "other")[:inputs]]
    given = onnx.helper.make_tensor_value_info("output", kind, [1, None, 4, 4])
    graph = onnx.helper.make_graph([node], "net", taken, [given], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path)
    return path


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "opset": ({"opset": 12}, "is of opset 12, and scales for each channel need 13: export it with opset=13 or newer"),
    "float16": ({"dtype": "FLOAT16"}, "only files that take one input in float32"),
    "two inputs": ({"inputs": 2}, "only files that take one input in float32"),
    "no weights": ({"operator": "Relu"}, "has no conv or linear layer with constant weights"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_other_kinds_are_refused(case: str, tmp_path: Path) -> None:
    options, message = FILES[case]
    path = file_of(tmp_path / "net.onnx", **options)
    with pytest.raises(InvalidInput, match=message):
        quantize_onnx(path, tmp_path / "out.onnx", [X])
    path.write_text("text")
    with pytest.raises(InvalidInput, match=r"'.*net.onnx' can't be read as an ONNX file"):
        quantize_onnx(path, tmp_path / "out.onnx", [X])
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_a_quantized_file_is_not_quantized_again(tmp_path: Path, report: QuantizationReport) -> None:
    with pytest.raises(InvalidInput, match="is quantized already"):
        quantize_onnx(report.path, tmp_path / "net.onnx", [X])


@pytest.mark.slow
def test_a_file_of_a_fixed_batch_gets_batches_of_its_size(tmp_path: Path) -> None:
    path = repfx.export_onnx(net(), tmp_path / "net.onnx", X[:5], dynamic_batch=False).path
    found = quantize_onnx(path, tmp_path / "int8.onnx", [X], labelled=[(X, Y)])
    assert found.images == 95
    assert found.accuracy is not None
    assert found.accuracy.float32 == pytest.approx(float((net()(X).argmax(1) == Y).double().mean()))
    with pytest.raises(InvalidInput, match="gave no batch of 5 inputs, which is what the file takes at once"):
        quantize_onnx(path, tmp_path / "other.onnx", [X[:4]])


def test_what_overflows_in_float_is_named(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(InvalidInput, match="'2' outputs numbers that are not finite for an input of calibrate"):
        quantize_onnx(exported, tmp_path / "net.onnx", [X * 3e38])


def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"needs onnxruntime, .*pip install 'repfx\[onnx\]'"):
        quantize_onnx(exported, tmp_path / "net.onnx", [X])


def test_a_failure_of_onnxruntime_is_one_sentence(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no\nmore")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", fail)
    with pytest.raises(ExportError, match=r"onnxruntime can't quantize .*, or run what it made: no\.$"):
        quantize_onnx(exported, tmp_path / "net.onnx", [X])
    assert not list(tmp_path.iterdir())


def kernels_for(path: Path) -> Counter[str]:
    """How many nodes of each operator onnxruntime runs for a file on this machine."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/run.onnx"
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(f"{folder}/run.onnx").graph.node)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"per_channel": False, "reduce_range": True}, {"correct": True}])
def test_sums_and_concatenations_run_with_kernels_for_integers(options: dict[str, Any], tmp_path: Path) -> None:
    exact = repfx.export_onnx(trained(Joined(), None), tmp_path / "net.onnx", NETS_X).path
    found = kernels_for(quantize_onnx(exact, tmp_path / "int8.onnx", [NETS_X], **options).path)
    assert (found["QLinearConv"], found["QLinearAdd"], found["QLinearConcat"], found["QGemm"]) == (4, 1, 1, 1)
    assert not found.keys() & {"Conv", "Add", "Concat", "Gemm", "Relu", "MaxPool"}

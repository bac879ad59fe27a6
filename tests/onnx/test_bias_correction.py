"""`quantize_onnx(…, correct=True)`: no channel's mean is off by more than a bias can say, and nothing else is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.onnx.layer_ranges import tapped, weighted_layers
from repfx.testing import randomize_batch_norm

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Net(nn.Module):
    """Layers that quantization treats in different ways: before a ReLU, depthwise, transposed, without a bias, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8))
        self.bare = nn.Conv2d(8, 12, 1, bias=False)
        self.up = nn.ConvTranspose2d(12, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bare(self.depth(self.stem(x))))
        found: Tensor = self.head(self.up(x).mean((2, 3)))
        return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model: Any = randomize_batch_norm(Net()).eval()
    with torch.no_grad():  # so that one scale for a whole tensor rounds most of it coarsely
        model.depth[0].weight[0] *= 30
    path = tmp_path_factory.mktemp("files") / "float.onnx"
    repfx.export_onnx(model, path, inputs()[0][:2])
    return path


def inputs() -> list[Tensor]:
    return list(torch.randn(48, 3, 10, 12, generator=torch.Generator().manual_seed(1)).split(16))


def channel_means(path: Path, source: Path) -> dict[str, Tensor]:
    """The mean of each channel of each layer's own output."""
    layers, model = weighted_layers(onnx.load(source)), onnx.load(path)
    nodes = {node.name: node.output[0] for node in model.graph.node}
    run = tapped(model, [nodes[layer.node] for layer in layers])
    values = [torch.cat(each) for each in zip(*(run(batch) for batch in inputs()))]
    return {layer.name: value.double().movedim(1, 0).flatten(1).mean(1) for layer, value in zip(layers, values)}


def quantized(source: Path, target: Path, **options: Any) -> Any:
    return repfx.quantize_onnx(source, target, inputs(), per_channel=False, **options)


def test_no_channel_s_mean_is_moved(source: Path, tmp_path: Path) -> None:
    plain = quantized(source, tmp_path / "plain.onnx")
    report = quantized(source, tmp_path / "corrected.onnx", correct=True)
    assert (plain.corrected, report.corrected) == ((), ("stem.0", "depth.0", "up", "head"))
    assert "biases  of 4 layers corrected" in str(report)
    exact, before, after = (
        channel_means(path, source) for path in (source, tmp_path / "plain.onnx", tmp_path / "corrected.onnx")
    )
    for name in report.corrected:
        scale = float(exact[name].abs().max())
        assert float((after[name] - exact[name]).abs().max()) < 2e-3 * scale, name
    moved = float((before["depth.0"] - exact["depth.0"]).abs().max())
    assert moved > 1e-2 * float(exact["depth.0"].abs().max())


def test_only_biases_change(source: Path, tmp_path: Path) -> None:
    quantized(source, tmp_path / "plain.onnx")
    quantized(source, tmp_path / "corrected.onnx", correct=True)
    one, two = (onnx.load(tmp_path / f"{name}.onnx") for name in ("plain", "corrected"))
    assert [str(node) for node in one.graph.node] == [str(node) for node in two.graph.node]
    changed = {a.name for a, b in zip(one.graph.initializer, two.graph.initializer) if a != b}
    assert len(changed) == 4
    assert all("bias" in name for name in changed)


def test_a_layer_in_float32_has_a_bias_in_float32(source: Path, tmp_path: Path) -> None:
    report = quantized(source, tmp_path / "m.onnx", correct=True, keep_float=["depth.0"])
    assert "depth.0" in report.corrected
    exact, after = (channel_means(path, source)["depth.0"] for path in (source, tmp_path / "m.onnx"))
    assert float((after - exact).abs().max()) < 1e-5 * float(exact.abs().max())


def test_a_file_without_biases_is_quantized_as_ever(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    repfx.export_onnx(model, tmp_path / "float.onnx", inputs()[0][:2])
    report = quantized(tmp_path / "float.onnx", tmp_path / "m.onnx", correct=True)
    assert report.corrected == ()

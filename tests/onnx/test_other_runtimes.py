"""Exported files also open in other runtimes than onnxruntime, which checks them, and give the same there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.onnx.file import open_session
from repfx.testing import randomize_batch_norm, relative_error

openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

X = torch.linspace(-50, 50, 4 * 3 * 16 * 12).sin().reshape(4, 3, 16, 12)
OTHER = torch.linspace(-30, 30, 3 * 3 * 22 * 18).cos().reshape(3, 3, 22, 18)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A model with branches beside depthwise, pointwise and plain convs, not yet fused."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    return randomize_batch_norm(repfx.expand(plain, "repvgg")).eval()


def run(path: Path, x: Tensor) -> Tensor:
    """Run a file in OpenVINO with float32 inside. On some processors OpenVINO would compute in half precision otherwise."""
    core: Any = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([x.numpy()])[0].copy()).float()


@pytest.mark.slow
def test_openvino_gives_the_same_in_float32_at_any_size(tmp_path: Path, model: nn.Module) -> None:
    path = repfx.export_onnx(model, tmp_path / "net.onnx", X, dynamic_size=True, opset=14).path
    for x in (X, OTHER):
        assert relative_error(run(path, x), model(x)) < 1e-5


@pytest.mark.slow
def test_openvino_gives_the_same_in_float16(tmp_path: Path, model: nn.Module) -> None:
    path = repfx.export_onnx(model, tmp_path / "half.onnx", X, dtype=torch.float16).path
    for x in (X, X[:3]):
        assert relative_error(run(path, x.half()), model(x)) < 2e-2


@pytest.mark.slow
def test_openvino_gives_the_same_in_8_bits(tmp_path: Path, model: nn.Module) -> None:
    """Weights have 7 bits, because with 8 the kernels of some processors overflow, in OpenVINO as in onnxruntime."""
    exact = repfx.export_onnx(model, tmp_path / "net.onnx", X).path
    for per_channel in (True, False):
        path = repfx.quantize_onnx(exact, tmp_path / "int8.onnx", [X], per_channel=per_channel, reduce_range=True).path
        session = open_session(path, optimized=False)
        (expected,) = session.run(None, {session.get_inputs()[0].name: X[:3].numpy()})
        assert (
            relative_error(run(path, X[:3]), torch.from_numpy(expected)) < 0.01
        )  # a number halfway between two steps may round either way
        assert 1e-3 < relative_error(run(path, X[:3]), model(X[:3])) < 0.1

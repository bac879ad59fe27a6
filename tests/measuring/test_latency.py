"""`Latency` measures each conv once, in torch and in onnxruntime, and tells `fuse` what is quick."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import repfx
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.cost import weights
from repfx.errors import InvalidInput
from repfx.measuring import latency as file
from repfx.measuring.latency import Latency
from repfx.testing import relative_error

CONVS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5), (2, 6)),
    "linear, sequence": (nn.Linear(6, 5), (2, 3, 6)),
    "1d, dilated": (nn.Conv1d(6, 4, 3, dilation=2), (1, 6, 20)),
    "2d, strided groups": (nn.Conv2d(6, 4, (3, 5), stride=(2, 1), padding=(1, 2), groups=2), (2, 6, 9, 12)),
    "3d": (nn.Conv3d(2, 4, 3), (1, 2, 5, 6, 7)),
    "reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (1, 3, 8, 9)),
}


def spec_of(layer: Any) -> ConvSpec:
    return ConvSpec.of(layer) if hasattr(layer, "kernel_size") else ConvSpec(6, 5, (), (), (), ())


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize("name", CONVS)
def test_it_measures_once(name: str, runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = CONVS[name]
    latency = Latency(runtime)
    first = latency(spec_of(layer), shape)
    assert 0 < first < 1
    monkeypatch.setattr(file, "measure_times", None)
    assert latency(spec_of(layer), shape) == first


def test_without_a_shape_weights_count() -> None:
    spec = ConvSpec.of(nn.Conv2d(3, 8, 3))
    assert Latency()(spec, None) == weights(spec) == 216


def test_no_such_runtime() -> None:
    with pytest.raises(InvalidInput, match="there is no runtime 'tflite': choose 'torch' or 'onnxruntime'"):
        Latency("tflite")  # type: ignore[arg-type]


def test_what_isn_t_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(InvalidInput, match=r"onnxruntime isn't installed: pip install 'repfx\[onnx\]'"):
        Latency("onnxruntime")


def test_what_is_quick_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds for each conv are made up. A pair that has more weights as one conv becomes one."""
    monkeypatch.setattr(file, "measure_times", lambda *_, **__: {"conv": [3.0, 2.0, 4.0]})
    model = nn.Sequential(nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)).double().eval()
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    assert len(list(repfx.fuse(model).children())) == 2
    quick = repfx.fuse(model, example=x, cost=Latency())
    assert len(list(quick.children())) == 1
    assert relative_error(quick(x), model(x)) < 1e-12

"""Random graphs of ONNX, fused and compared in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from repfx.onnx.fusing.float64_file import run_in_float64
from repfx.onnx.fusing.fuse_file import fused_model, save_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
from tests.onnx.random_file import RandomFile  # noqa: E402

SIDES = (5, 6, 7)


@pytest.mark.parametrize("seed", range(6))
def test_a_random_file_computes_the_same(seed: int, tmp_path: Path) -> None:
    compare(seed, tmp_path, 12)


@pytest.mark.slow
@pytest.mark.slow_one_in(20)
@pytest.mark.parametrize("seed", range(100, 300))
def test_more_random_files_compute_the_same(seed: int, tmp_path: Path) -> None:
    compare(seed, tmp_path, 25)


def compare(seed: int, folder: Path, length: int) -> None:
    source = RandomFile(seed, dtype=np.float64).write(folder / "in.onnx", length)
    model = onnx.load(source)
    size = model.graph.input[0].type.tensor_type.shape.dim
    feeds = {"x": np.random.default_rng(seed).normal(size=(2, 4, *SIDES[: len(size) - 2]))}
    fused, report = fused_model(source)
    save_model(fused, folder / "fused.onnx", source)
    onnx.checker.check_model(str(folder / "fused.onnx"))
    assert sum(report.nodes.values()) <= sum(report.nodes_before.values())
    given = run_in_float64(folder / "fused.onnx", feeds)
    for expected, output in zip(run_in_float64(source, feeds), given, strict=True):
        assert expected.shape == output.shape
        assert np.abs(expected - output).max(initial=0) <= 1e-9 * np.abs(expected).max(initial=1e-30)

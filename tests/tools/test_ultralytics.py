"""ultralytics fuses expanded models by its own code, and by `AutoBackend`, which `val` and `predict` use."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.blocks.block import RepBlock
from repfx.testing import assert_same_map, randomize_batch_norm

pytestmark = pytest.mark.tools
pytest.importorskip("ultralytics")

BACKBONE = "model.[0-9].*"


@pytest.fixture(autouse=True)
def threads_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def expanded(name: str, spec: Any) -> Any:
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = randomize_batch_norm(DetectionModel(f"{name}.yaml", verbose=False).double())
    return randomize_batch_norm(repfx.expand(model, spec), seed=1).eval()


def boxes_of(model: nn.Module) -> Any:
    """Return a function from a picture to the boxes and scores before non-maximum suppression."""

    def call(x: Tensor) -> Any:
        output = model(x)
        return output[0] if isinstance(output, (tuple, list)) else output

    return call


def left_in(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, (RepBlock, nn.BatchNorm2d))]


@pytest.mark.parametrize("preset", ["repvgg", "dbb", "orepa"])
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_its_own_fuse_keeps_the_function(name: str, preset: str) -> None:
    model = expanded(name, {BACKBONE: preset})
    x = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    own = copy.deepcopy(model).fuse(verbose=False)
    assert left_in(own) == []
    assert len([module for module in model.modules() if isinstance(module, RepBlock)]) > 10
    assert_same_map(boxes_of(own), boxes_of(model), x)


def test_it_gives_what_fuse_gives_and_so_does_its_backend() -> None:
    from ultralytics.nn.autobackend import AutoBackend

    model = expanded("yolov8n", "repvgg")
    x = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    fused = repfx.fuse(model)
    assert left_in(fused) == []
    assert_same_map(boxes_of(copy.deepcopy(model).fuse(verbose=False)), boxes_of(fused), x)
    backend = AutoBackend(model=copy.deepcopy(model).float(), device=torch.device("cpu"), verbose=False)
    assert left_in(backend) == []
    assert_same_map(boxes_of(backend), boxes_of(fused.float()), x.float(), tolerance=1e-5)  # float32's own rounding

"""`fuse_onnx` on files that exporters write of nets in their training form, and on files of other people."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.algebra.layers import is_conv
from repfx.testing import randomize_batch_norm, relative_error
from tests.inline_net import Net

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def exported(model: nn.Module, x: Tensor, path: Path, *, opset: int, dynamo: bool) -> Path:
    """Export a model in eval mode, with all branches and BatchNorms, for any batch."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    options: dict[str, Any] = {"opset_version": opset, "dynamo": dynamo}
    if dynamo:
        options |= {"optimize": False, "external_data": False, "dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}
    else:
        options |= {"do_constant_folding": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
        options["training"] = torch.onnx.TrainingMode.PRESERVE
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (x,), path, **options)
    finally:
        logging.disable(disabled)
    return path


def outputs(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def check(model: nn.Module, x: Tensor, path: Path, *, opset: int, dynamo: bool) -> None:
    """Export and fuse a net: as many convs as the fused module has, within four times the rounding of float32, and nothing else changed."""
    source = exported(model, x, path, opset=opset, dynamo=dynamo)
    report = repfx.fuse_onnx(source, source.with_name("fused.onnx"))
    convs = sum(map(is_conv, repfx.fuse(model).modules()))
    assert (report.convs, report.nodes.get("BatchNormalization", 0)) == (convs, 0)
    assert report.opset == opset

    with torch.no_grad():
        exact = model.double()(x.double())
    rounding = relative_error(outputs(source, x).double(), exact)
    assert relative_error(outputs(report.path, x).double(), exact) <= 4 * max(rounding, 2**-24)
    assert_nothing_else_changed(source, report.path)


def assert_nothing_else_changed(source: Path, result: Path) -> None:
    before, after = onnx.load(source), onnx.load(result)
    for name in ("input", "output"):
        assert getattr(after.graph, name) == getattr(before.graph, name)
    for name in ("ir_version", "metadata_props", "functions", "producer_name"):
        assert getattr(after, name) == getattr(before, name)
    assert opsets(after) == opsets(before)
    known = {tensor.name: tensor for tensor in before.graph.initializer}
    made_by = {output: node.op_type for node in before.graph.node for output in node.output}
    for (
        tensor
    ) in after.graph.initializer:  # CastLike asks a tensor for its type, and the tensor may be merged into others
        assert "_fused_" in tensor.name or tensor == known.get(tensor.name) or made_by[tensor.name] == "CastLike"
    nodes = {node.SerializeToString(): place for place, node in enumerate(before.graph.node)}
    linear = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add")  # a node may read what a rule has passed by
    places = [nodes.get(node.SerializeToString()) for node in after.graph.node if node.op_type not in linear]
    assert None not in places
    assert places == sorted(places)  # type: ignore[type-var]


def opsets(model: Any) -> list[tuple[str, int]]:
    return [(entry.domain, entry.version) for entry in model.opset_import]


def small(dimensions: int) -> nn.Module:
    """A net of branches, an activation and a linear head."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dimensions - 1]
    block = Net(
        lambda self, x: torch.relu(self.one(self.a(x)) + self.two(self.b(x)) + self.three(x)),
        a=conv(
            6, 6, 3, padding=1, bias=dimensions == 3
        ),  # of a conv3d without a bias, torch writes a file that nobody can run
        one=norm(6),
        b=conv(6, 6, 1),
        two=norm(6),
        three=norm(6),
    )
    return nn.Sequential(
        conv(3, 6, 3, stride=2), norm(6), nn.ReLU(), block, pool(1), nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4)
    )


SIZES = {1: (19,), 2: (13, 10), 3: (7, 9, 8)}
EXPORTERS = [(opset, False) for opset in range(13, 21)] + [(opset, True) for opset in range(18, 24)]


@pytest.mark.parametrize(
    ("opset", "dynamo", "dimensions"),
    [
        *((17, False, dimensions) for dimensions in SIZES),
        (18, True, 2),
        *(pytest.param(18, True, dimensions, marks=pytest.mark.slow) for dimensions in (1, 3)),
    ],
)
def test_small_nets(opset: int, dynamo: bool, dimensions: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(small(dimensions)).eval()
    check(model, torch.randn(2, 3, *SIZES[dimensions]), tmp_path / "net.onnx", opset=opset, dynamo=dynamo)


@pytest.mark.slow
@pytest.mark.slow_one_in(3)
@pytest.mark.parametrize(("opset", "dynamo"), EXPORTERS, ids=lambda value: str(value))
def test_every_opset(opset: int, dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(small(2)).eval()
    check(model, torch.randn(2, 3, 13, 10), tmp_path / "net.onnx", opset=opset, dynamo=dynamo)


def of_timm(name: str) -> nn.Module:
    model: nn.Module = pytest.importorskip("timm").create_model(name)
    return model


def of_torchvision(name: str) -> nn.Module:
    model: nn.Module = pytest.importorskip("torchvision").models.get_model(name)
    return model


NETS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(of_torchvision, name) for name in ("resnet18", "mobilenet_v2")},
    **{name: partial(of_timm, name) for name in ("repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9")},
}


@pytest.mark.slow
@pytest.mark.slow_one_in(6)
@pytest.mark.parametrize(("opset", "dynamo"), [(13, False), (17, False), (18, True), (23, True)], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_nets_in_their_training_form(name: str, opset: int, dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(NETS[name]()).eval()
    check(model, torch.randn(2, 3, 64, 64), tmp_path / "net.onnx", opset=opset, dynamo=dynamo)


@pytest.mark.slow
def test_the_blocks_of_a_preset(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1)
    )
    model = randomize_batch_norm(repfx.expand(plain, "dbb")).eval()
    check(model, torch.randn(2, 3, 13, 10), tmp_path / "net.onnx", opset=17, dynamo=False)


# ---- files of other people


LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
OTHERS = {
    "resnet50": 0,
    "inception_v2": 0,
    "shufflenet": 0,
    "densenet121": 62,
    "squeezenet": 0,
}  # BatchNorms behind concatenations stay


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_files_that_come_with_onnx(name: str, tmp_path: Path) -> None:
    """They are of the third version of the format: initializers are inputs, and nodes compute the weights."""
    source = LIGHT / f"light_{name}.onnx"
    report = repfx.fuse_onnx(source, tmp_path / "fused.onnx")
    assert report.max_error < 1e-5
    assert report.nodes.get("BatchNormalization", 0) == OTHERS[name]
    assert report.convs == report.convs_before

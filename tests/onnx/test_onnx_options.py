"""Options of exported files: free sizes, older opsets, float16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repfx.errors import ExportError, InvalidInput
from repfx.onnx.export import export_onnx
from repfx.onnx.free_axes import FreeAxes
from repfx.testing import randomize_batch_norm, relative_error

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

X = torch.linspace(-50, 50, 2 * 3 * 16 * 12).sin().reshape(2, 3, 16, 12)


class DownAndUp(nn.Module):
    """A model that takes even sizes only, because it adds a map that was halved in size and doubled again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        lower: Tensor = self.up(torch.relu(self.down(y)))
        return y + lower


class Scaled(nn.Module):
    """A model with two inputs; the second is one number for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        y: Tensor = self.conv(image)
        return y * scale[:, None, None, None]


class Pairs(nn.Module):
    """A model that runs two batches as one, and then cuts the result along the free axis, at which onnxscript's optimizer fails."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        halves: Tensor = self.conv(torch.cat([x, y]))
        first, second = halves.chunk(2, 0)
        return first - 2 * second


class Head(nn.Module):
    """A head of operators that changed between opsets 13 and 18: pooling, slices, shapes, activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.conv(x)).chunk(2, 1)
        a, b = nn.functional.hardswish(a), b.transpose(0, 1).flatten(1).reshape(4, b.shape[0], -1).transpose(0, 1)
        return a.mean((2, 3)) + b.amax(2).reshape(-1, 2, 2).flatten(1)


def flat(size: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * size, 2))


def run(path: Path, *inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


@pytest.mark.slow
def test_height_and_width_are_free(tmp_path: Path) -> None:
    model = randomize_batch_norm(DownAndUp()).eval()
    report = export_onnx(model, tmp_path / "net.onnx", X, dynamic_size=True)
    assert report.inputs[0].shape == ("batch", 3, "height", "width")
    assert report.outputs[0].shape == ("batch", 4, "height", "width")
    other = torch.randn(3, 3, 22, 30)
    assert relative_error(run(report.path, other), model(other)) < 1e-5


@pytest.mark.slow
def test_a_batch_may_be_cut_though_the_optimizer_can_not(tmp_path: Path) -> None:
    model = Pairs().eval()
    export_onnx(model, tmp_path / "model.onnx", (X, X.flip(2)))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x, y = torch.randn(2, 5, 3, 16, 12)
    given = session.run(None, {"x": x.numpy(), "y": y.numpy()})[0]
    assert relative_error(model(x, y), torch.from_numpy(given)) < 1e-5


@pytest.mark.slow
def test_axes_are_free_by_the_names_they_are_given(tmp_path: Path) -> None:
    axes = {"image": {0: "images", -1: "columns"}, "scale": {0: "images"}}
    scale = torch.tensor([2.0, 3.0])
    model = Scaled()
    report = export_onnx(model, tmp_path / "net.onnx", (X, scale), dynamic_axes=axes)
    assert [value.shape for value in report.inputs] == [("images", 3, 16, "columns"), ("images",)]
    assert report.outputs[0].shape[:3] == ("images", 4, 14)
    image, scale = torch.randn(5, 3, 16, 9), torch.randn(5)
    assert relative_error(run(report.path, image, scale), model(image, scale)) < 1e-5


def test_an_input_is_compared_at_another_size_along_each_axis() -> None:
    free = FreeAxes.usual(X, batch=True, size=True)
    first, *others = free.others(X)
    assert all(first[name] != size for name, size in free.sizes(X).items())
    assert others == [{"batch": 3, "height": 48, "width": 44}, {"batch": 3, "height": 32, "width": 24}]
    resized = free.resized(X, first)
    assert resized.shape == (3, 3, first["height"], first["width"])
    assert set(resized.flatten().tolist()) <= set(X.flatten().tolist())


REFUSED: dict[str, tuple[nn.Module, Any, dict[str, Any], type[Exception], str]] = {
    "no other size": (
        flat(16 * 12),
        X,
        {"dynamic_size": True},
        ExportError,
        "takes no other batch, height, width than in x.*can't run on x",
    ),
    "file of one size": (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(4)),
        X,
        {"dynamic_size": True},
        ExportError,
        "onnxruntime.* it runs on x itself, so leave fewer axes free than batch, height, width|else than torch",
    ),
    "no sides": (nn.Linear(3, 2), X[:, :, 0, 0], {"dynamic_size": True}, InvalidInput, "x has 2 axes: give dynamic_ax"),
    "input": (Scaled(), (X, X[:, 0, 0, 0]), {"dynamic_axes": {"img": {0: "n"}}}, InvalidInput, "'img'; did you mean"),
    "axis": (flat(192), X, {"dynamic_axes": {"input": {4: "n"}}}, InvalidInput, "has axes 0 to 3, and no axis 4"),
    "name": (flat(192), X, {"dynamic_axes": {"input": {2: "a b"}}}, InvalidInput, "to be called 'a b': give a name"),
    "sizes": (flat(192), X, {"dynamic_axes": {"input": {2: "n", 3: "n"}}}, InvalidInput, "'n' and are 16 and 12 long"),
    "dtype": (flat(192), X, {"dtype": torch.bfloat16}, InvalidInput, "dtype is torch.bfloat16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_is_refused(case: str, tmp_path: Path) -> None:
    model, x, options, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        export_onnx(model, tmp_path / "net.onnx", x, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.one_in(2)
@pytest.mark.parametrize("opset", [13, 17])
def test_a_file_for_older_runtimes_gives_the_same(tmp_path: Path, opset: int) -> None:
    model = Head().eval()
    report = export_onnx(model, tmp_path / "net.onnx", X, opset=opset)
    assert report.opset == opset
    assert onnx.load(report.path).ir_version <= 8
    assert relative_error(run(report.path, X), model(X)) < 1e-5


# ---- float16


def test_float16_is_rounded_once(tmp_path: Path) -> None:
    """1 + 2⁻¹¹ + 2⁻³⁰ rounds to 1 + 2⁻¹⁰ in float16; by way of float32 it would become 1."""
    first: Any = nn.Conv2d(1, 2, 1, bias=False)
    second: Any = nn.Conv2d(2, 1, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([1 + 2**-11, 2**-15]).reshape(2, 1, 1, 1))
        second.weight.copy_(torch.tensor([1, 2**-15]).reshape(1, 2, 1, 1))
    report = export_onnx(nn.Sequential(first, second), tmp_path / "net.onnx", X[:, :1], dtype=torch.float16)
    (weight,) = onnx.load(report.path).graph.initializer
    assert onnx.numpy_helper.to_array(weight).item() == 1 + 2**-10


@pytest.mark.slow
def test_float16_is_held_against_float32(tmp_path: Path) -> None:
    model = randomize_batch_norm(DownAndUp()).eval()
    report = export_onnx(model, tmp_path / "net.onnx", X, dtype=torch.float16)
    assert {value.dtype for value in (*report.inputs, *report.outputs)} == {"float16"}
    assert 1e-5 < report.max_error < report.tolerance == 2e-2
    assert relative_error(run(report.path, X.half()).float(), model(X.half().float())) <= report.max_error
    assert next(model.parameters()).dtype == torch.float32


def test_what_float16_can_not_hold_is_named(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3))
    nn.init.constant_(model[0].bias, 7e4)
    with pytest.raises(ExportError, match=r"'0.bias' is not finite in torch.float16, whose largest number is 65504"):
        export_onnx(model, tmp_path / "net.onnx", X, dtype=torch.float16)


@pytest.mark.slow
def test_an_overflow_inside_is_found_though_the_runtime_of_a_cpu_does_not_see_it(tmp_path: Path) -> None:
    model: Any = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Conv2d(1, 1, 1, bias=False), nn.ReLU())))
    for place, weight in ((0, 300.0), (2, 400.0), (4, 1e-3)):
        nn.init.constant_(model[place].weight, weight)
    with pytest.raises(ExportError, match="'2' outputs numbers for x beyond the range of float16, ±65504"):
        export_onnx(model, tmp_path / "net.onnx", X[:, :1] + 2, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_size_that_depends_on_numbers_beside_fixed_axes(tmp_path: Path) -> None:
    class Finds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            return torch.nonzero(y > 0).float()

    report = export_onnx(Finds().eval(), tmp_path / "net.onnx", torch.randn(2, 3, 8, 9), dynamic_batch=False)
    assert report.max_error == 0

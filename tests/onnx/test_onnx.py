from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
import repfx.onnx.file
import repfx.onnx.program
from repfx.errors import ExportError, InvalidInput
from repfx.onnx.export import export_onnx
from repfx.onnx.file import Value
from repfx.records.target_file import staged
from repfx.testing import randomize_batch_norm

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

X = torch.linspace(-50, 50, 2 * 3 * 8 * 8).sin().reshape(2, 3, 8, 8)


class Net(nn.Module):
    """A conv, a BatchNorm with random statistics, and any function at the end."""

    def __init__(self, end: Callable[[Tensor], Any] = torch.relu) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        nn.init.normal_(self.bn.get_buffer("running_mean"))
        nn.init.uniform_(self.bn.get_buffer("running_var"), 0.3, 2)
        nn.init.normal_(self.bn.weight)
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.bn(self.conv(x)))


class Several(nn.Module):
    """A model with two inputs, whose outputs are a dict with a list and a None."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor, shift: Tensor) -> dict[str, Any]:
        y = self.conv(image) + shift[:, None, None, None]
        return {"out": y, "aux": [y.mean((1, 2, 3)), None]}


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, feeds)]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / a.abs().max()).detach())


def test_the_file_computes_the_model_in_eval_mode_for_any_batch_size(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), Net(), nn.Dropout(0.5)).train()
    state = copy.deepcopy(model.state_dict())
    one = X[:1].clone()
    disabled = logging.root.manager.disable
    report = export_onnx(model, tmp_path / "net.onnx", one)

    assert list(tmp_path.iterdir()) == [report.path]
    assert report.nodes == {"Conv": 1, "Relu": 2}
    assert report.inputs == (Value("input", "float", ("batch", 3, 8, 8)),)
    assert report.outputs == (Value("output", "float", ("batch", 4, 8, 8)),)
    assert report.size == report.path.stat().st_size
    assert 0 < report.max_error <= report.tolerance == 1e-4
    assert "1 Conv" in str(report)
    assert "input: float [batch, 3, 8, 8]" in str(report)

    for x in (one, X, torch.randn(5, 3, 8, 8)):
        assert relative_error(copy.deepcopy(model).eval()(x.clone()), run(report.path, x)[0]) < 1e-5

    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(one, X[:1])
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert logging.root.manager.disable == disabled


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < (2, 9), reason="torch 2.8 can't export a model that gives out None")  # type: ignore[operator]
@pytest.mark.parametrize("as_keywords", [False, True])
def test_several_inputs_and_nested_outputs(tmp_path: Path, as_keywords: bool) -> None:
    model = Several()
    shift = torch.tensor([1.0, 2.0])
    report = export_onnx(model, tmp_path / "net.onnx", {"image": X, "shift": shift} if as_keywords else (X, shift))
    assert [str(value) for value in report.inputs] == ["image: float [batch, 3, 8, 8]", "shift: float [batch]"]
    prefix = "output_" if as_keywords else ""
    assert [value.name for value in report.outputs] == [f"{prefix}out", f"{prefix}aux_0"]
    expected = model(X, shift)
    out, aux = run(report.path, X, shift)
    assert relative_error(expected["out"], out) < 1e-5
    assert relative_error(expected["aux"][0], aux) < 1e-5


@pytest.mark.slow
def test_a_fixed_batch_an_opset_and_an_input_without_batch(tmp_path: Path) -> None:
    report = export_onnx(Net(), tmp_path / "net.onnx", X[0], dynamic_batch=False, opset=19)
    assert report.opset == 19
    assert report.inputs[0].shape == (3, 8, 8)


@pytest.mark.slow
def test_float16_runs_in_its_own_dtype_at_its_own_tolerance(tmp_path: Path) -> None:
    report = export_onnx(Net().half(), tmp_path / "net.onnx", X.half())
    assert report.inputs[0].dtype == "float16"
    assert report.max_error < 1e-2 < report.tolerance


@pytest.mark.slow
def test_weights_past_the_limit_of_protobuf_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repfx.onnx.program, "SINGLE_FILE_LIMIT", 100)
    model = nn.Conv2d(3, 512, 3)
    report = export_onnx(model, tmp_path / "net.onnx", X)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert report.size > 4 * model.weight.numel() > report.path.stat().st_size
    assert relative_error(model.eval()(X).detach(), run(report.path, X)[0]) < 1e-5


def depends_on_data(y: Tensor) -> Tensor:
    return y if y.sum() > 0 else -y


def draws_noise(y: Tensor) -> Tensor:
    return y + torch.rand_like(y)


FAILURES: dict[str, tuple[nn.Module, Tensor, dict[str, Any], type[Exception], str]] = {
    "control flow": (Net(depends_on_data), X, {}, ExportError, "can't be exported: what it computes depends on values"),
    "fixed batch": (
        Net(lambda y: y.reshape(2, -1)),
        X,
        {},
        ExportError,
        "2 in this example.*: pass dynamic_batch=False",
    ),
    "no operator": (Net(lambda y: torch.linalg.eigh(y)[0]), X, {}, ExportError, "no operator for torch's .*eigh"),
    "float64": (
        Net().double(),
        X.double(),
        {},
        ExportError,
        "can't run .* implementation for Conv.*: give dtype=torch.float32",
    ),
    "bfloat16": (Net().bfloat16(), X.bfloat16(), {}, ExportError, "can't run .*: give dtype=torch.float32"),
    "another function": (Net(draws_noise), X, {}, ExportError, "else than torch: worst relative difference .*allowed"),
    "old opset": (Net(), X, {"opset": 12}, InvalidInput, "opset 12 can't be written: it must be one from 13 to"),
    "no opset": (Net(), X, {"opset": 999}, InvalidInput, "opset 999 can't be written: it must be one from 13 to"),
    "newer operator": (
        Net(lambda y: nn.functional.grid_sample(y, y[:, :2].movedim(1, -1))),
        X,
        {"opset": 13},
        ExportError,
        "opset 13 has no GridSample, which the model needs: choose a newer one",
    ),
    "shape": (Net(), X[:, :2], {}, InvalidInput, r"can't run on x = float32 \[2, 2, 8, 8\]: Given groups=1"),
    "dtype": (Net().half(), X, {}, InvalidInput, r"can't run on x = float32 \[2, 3, 8, 8\]: "),
    "no numbers": (Net(lambda y: y[:0]), X, {}, InvalidInput, "gives no numbers"),
    "tolerance": (Net(), X, {"tolerance": 0}, InvalidInput, "tolerance is 0"),
}


@pytest.mark.slow
@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_sentence_and_leaves_no_file(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, x, options, kind, message = FAILURES[case]
    (tmp_path / "net.onnx").write_text("the file from before")
    with pytest.raises(kind, match=message) as caught:
        export_onnx(model, tmp_path / "net.onnx", x, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert str(tmp_path) not in str(caught.value)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the file from before"]
    assert capfd.readouterr() == ("", "")


def test_a_fixed_batch_hides_no_deeper_reason(tmp_path: Path) -> None:
    model = Net(lambda y: depends_on_data(y.reshape(2, -1)))
    with pytest.raises(ExportError, match="depends on values"):
        export_onnx(model, tmp_path / "net.onnx", X)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a folder: give a file in it"),
        ("missing/net.onnx", "there is no folder"),
        ("file.txt/net.onnx", "there is no folder"),
        ("net.pt", "doesn't end in '.onnx'"),
        ("net\0.onnx", "null"),
        (f"{'n' * 300}.onnx", "can't write"),
        (3, "path is of type int"),
    ],
)
def test_a_path_that_can_not_be_written_is_found_before_any_work(tmp_path: Path, name: Any, message: str) -> None:
    (tmp_path / "file.txt").write_text("")

    class NeverRun(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("ran")

    with pytest.raises(InvalidInput, match=message):
        export_onnx(NeverRun(), f"{tmp_path}/{name}" if isinstance(name, str) else name, X)
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_a_folder_that_refuses_is_an_invalid_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("repfx.records.target_file.tempfile.TemporaryDirectory", refuse)
    with pytest.raises(InvalidInput, match=r"can't write into folder .*: Permission denied"):
        export_onnx(Net(), tmp_path / "net.onnx", X)


def test_a_file_is_replaced_through_a_link_and_only_when_finished(tmp_path: Path) -> None:
    (tmp_path / "real.onnx").write_text("old")
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    with staged(tmp_path / "link.onnx") as (target, staging):
        staging.write_text("new")
        assert target.read_text() == "old"
    assert (tmp_path / "link.onnx").is_symlink()
    assert (tmp_path / "real.onnx").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExportError, match=rf"needs {name}, .*pip install 'repfx\[onnx\]'"):
        export_onnx(Net(), tmp_path / "net.onnx", X)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_torchvision_models_are_exported_as_plain_convs(tmp_path: Path, name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    model = getattr(models, name)(num_classes=10)
    report = export_onnx(model, tmp_path / "net.onnx", torch.randn(1, 3, 64, 64))
    assert report.nodes["Conv"] == sum(
        isinstance(module, nn.Conv2d) for path, module in model.named_modules() if "aux" not in path
    )
    assert "BatchNormalization" not in report.nodes


@pytest.mark.slow
def test_a_detection_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    ssd = pytest.importorskip("torchvision.models.detection.ssd")
    backbone: Any = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1))
    backbone.out_channels = [8]
    boxes = ssd.DefaultBoxGenerator([[2]])
    model = ssd.SSD(backbone, boxes, (32, 32), num_classes=3, detections_per_img=4, topk_candidates=4).eval()
    with pytest.raises(ExportError, match=r"depends on values inside its tensors .*such as its backbone"):
        export_onnx(model, tmp_path / "net.onnx", ([torch.rand(3, 32, 32)],))
    assert not list(tmp_path.iterdir())


def far_from_zero() -> nn.Module:
    """A model whose values float32 rounds to steps of 2⁻¹¹ on the way."""
    conv: Any = nn.Conv2d(3, 8, 3)
    nn.init.constant_(conv.bias, 4096.0)
    shift: Any = nn.Conv2d(8, 8, 1)
    nn.init.dirac_(shift.weight)
    nn.init.constant_(shift.bias, -4096.0)
    return nn.Sequential(conv, nn.ReLU(), shift)


@pytest.mark.slow
def test_a_file_is_held_against_what_torch_itself_rounds(tmp_path: Path) -> None:
    """The image has so many pixels that some sums round to another step, in whatever order this processor adds."""
    torch.manual_seed(0)
    report = export_onnx(far_from_zero(), tmp_path / "m.onnx", torch.randn(2, 3, 96, 80))
    assert 1e-4 < report.max_error <= report.tolerance < 1e-2


@pytest.mark.slow
def test_what_is_further_off_than_rounding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_wrong(model: Any, *arguments: Any, **options: Any) -> None:
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            wrong.get_parameter("0.bias")[0] += 0.02
        repfx.onnx.program.write_program(wrong, *arguments, **options)

    monkeypatch.setattr("repfx.onnx.export.write_program", slightly_wrong)
    torch.manual_seed(0)
    with pytest.raises(ExportError, match="worst relative difference"):
        export_onnx(far_from_zero(), tmp_path / "m.onnx", torch.randn(2, 3, 12, 10))
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.slow
def test_a_wrong_optimization_is_told_from_a_wrong_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        """A session in which onnxruntime has rewritten the graph wrongly. (1.31 moves zero padding into a MaxPool.)"""

        def __init__(self, session: Any) -> None:
            self.session = session

        def get_inputs(self) -> Any:
            return self.session.get_inputs()

        def run(self, *arguments: Any) -> list[Any]:
            return [1.3 * output for output in self.session.run(*arguments)]

    def open_session(path: Path, *, optimized: bool = True) -> Any:
        session = repfx.onnx.file.open_session(path, optimized=optimized)
        return Wrong(session) if optimized else session

    monkeypatch.setattr("repfx.onnx.export.open_session", open_session)
    with pytest.raises(ExportError, match=r"3\.0e-01 .*with its graph optimizations off it agrees .*another version"):
        export_onnx(Net(), tmp_path / "m.onnx", X)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.one_in(3)
@pytest.mark.parametrize("axes", [(3,), (), (2, 5)], ids=["sequence", "rows", "picture"])
def test_blocks_of_linear_layers_are_written_as_linear_layers(tmp_path: Path, axes: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    expanded = randomize_batch_norm(repfx.expand(model, repfx.Spec(["kxk", "1x1-kxk"], layers="linear"))).eval()
    report = export_onnx(expanded, tmp_path / "linear.onnx", torch.randn(2, *axes, 6))
    assert sum(report.nodes.get(name, 0) for name in ("MatMul", "Gemm")) == 2
    for count in (2, 3):
        x = torch.randn(count, *axes, 6)
        assert relative_error(expanded(x), run(report.path, x)[0]) < 1e-5

"""`export_program`: the file gives the model's numbers at any size without repfx, and says what is known of classes and images."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
import repfx.onnx.program
from repfx.errors import ExportError, InvalidInput
from repfx.onnx.preprocessing import Preprocessing
from repfx.testing import relative_error
from tests.inline_net import ready

X = torch.linspace(-50, 50, 2 * 3 * 8 * 10, dtype=torch.float64).sin().reshape(2, 3, 8, 10)


def net(dimensions: int = 2) -> Any:
    """A block with branches, a stride and a head that takes any size."""
    conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    pool: Any = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dimensions]
    layers = nn.Sequential(conv(3, 4, 3, padding=1), nn.ReLU(), conv(4, 4, 3, stride=2), pool(1), nn.Flatten())
    return ready(repfx.expand(layers, "repvgg"))


def loaded(path: Path) -> Any:
    return torch.export.load(path).module()


def test_it_gives_the_model_s_numbers_at_any_size(tmp_path: Path) -> None:
    model = net()
    report = repfx.export_program(model, tmp_path / "m.pt2", X, dynamic_size=True)
    assert report.max_error < 1e-12
    x = torch.randn(5, 3, 13, 9, dtype=torch.float64)
    program = torch.export.load(report.path)
    assert relative_error(program.module()(x), model(x)) < 1e-12
    assert [str(node.target) for node in program.graph.nodes].count("aten.conv2d.default") == 2
    assert str(report).startswith(f"{report.path} (0.0")


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", [1, 3])
def test_other_dimensions_and_a_fixed_batch(dimensions: int, tmp_path: Path) -> None:
    model, x = net(dimensions), torch.randn(3, 3, *(7, 9, 8)[:dimensions], dtype=torch.float64)
    repfx.export_program(model, tmp_path / "m.pt2", x, dynamic_batch=False)
    assert relative_error(loaded(tmp_path / "m.pt2")(x), model(x)) < 1e-12
    with pytest.raises(Exception, match="3"):
        loaded(tmp_path / "m.pt2")(x[:2])


class Two(nn.Module):
    """Inputs by name, and outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, image: Tensor, scale: Tensor) -> dict[str, Any]:
        found = self.bn(self.conv(image))
        return {"scaled": found * scale, "both": [found, image.mean()]}


@pytest.mark.slow
def test_inputs_by_name_and_nested_outputs(tmp_path: Path) -> None:
    model, x = ready(Two()), {"image": X, "scale": torch.tensor(0.5, dtype=torch.float64)}
    repfx.export_program(model, tmp_path / "m.pt2", x, dynamic_axes={"image": {0: "batch", 3: "width"}})
    more = {**x, "image": torch.randn(4, 3, 8, 15, dtype=torch.float64)}
    found, expected = loaded(tmp_path / "m.pt2")(**more), model(**more)
    assert relative_error(found["scaled"], expected["scaled"]) < 1e-12
    assert relative_error(found["both"][0], expected["both"][0]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    model = net()
    report = repfx.export_program(model, tmp_path / "m.pt2", X, dtype=dtype)
    program = loaded(tmp_path / "m.pt2")
    fused = repfx.fuse(model)
    for name, weight in program.state_dict().items():
        assert torch.equal(weight, fused.get_parameter(name).to(dtype))
    assert report.max_error <= report.tolerance <= (1e-4 if dtype is torch.float32 else 1e-1)


_RUN = """
import json, sys, torch
sys.modules["repfx"] = None
x, expected = torch.load("numbers.pt")
extra = {"repfx.json": ""}
model = torch.export.load("m.pt2", extra_files=extra).module()
about = json.loads(extra["repfx.json"])
print(bool((model(x) - expected).abs().max() < 1e-10), json.loads(about["id2label"])["1"], json.loads(about["preprocessing"])["mean"])
"""


@pytest.mark.slow
def test_a_script_without_repfx_runs_it_and_finds_what_is_known(tmp_path: Path) -> None:
    model, labels = net(), ("ant", "bee", "cow", "dog")
    preprocessing = Preprocessing((3, 8, 10), (0.5, 0.25, 0.125), (1.0, 1.0, 2.0))
    repfx.export_program(model, tmp_path / "m.pt2", X, labels=labels, preprocessing=preprocessing)
    torch.save((X, model(X)), tmp_path / "numbers.pt")
    script = [sys.executable, "-c", _RUN]
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "True bee [0.5, 0.25, 0.125]\n", done.stderr


def test_the_file_holds_neither_paths_of_the_machine_nor_the_example(tmp_path: Path) -> None:
    repfx.export_program(net(), tmp_path / "m.pt2", X, about={"source": "a test"})
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for name, content in files.items():
        assert not re.search(rb"site-packages|\.py\b", content), name
        assert X[0, 0, 0].numpy().tobytes() not in content, name
    (about,) = (json.loads(content) for name, content in files.items() if name.endswith("repfx.json"))
    assert about["source"] == "a test"
    assert "expand" in about["journal"]


def test_a_program_that_gives_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.pt2").write_bytes(b"older")

    def slightly_wrong(model: Any, *arguments: Any) -> Any:
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            wrong.get_parameter("2.weight")[0] *= 1.1
        return repfx.onnx.program.exported(wrong, *arguments)

    monkeypatch.setattr("repfx.onnx.program_file.exported", slightly_wrong)
    with pytest.raises(ExportError, match=r"saved program gives something else .*worst relative difference"):
        repfx.export_program(net(), tmp_path / "m.pt2", X)
    assert (tmp_path / "m.pt2").read_bytes() == b"older"


def test_what_can_not_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"\.pt2"):
        repfx.export_program(net(), tmp_path / "m.onnx", X)
    with pytest.raises(InvalidInput, match="tolerance is 0"):
        repfx.export_program(net(), tmp_path / "m.pt2", X, tolerance=0)
    with pytest.raises(InvalidInput, match=r"can't run on x"):
        repfx.export_program(net(), tmp_path / "m.pt2", X[:, :2])
    fixed = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 8, 2)))
    with pytest.raises(ExportError, match=r"takes no other batch, height, width than in x"):
        repfx.export_program(fixed, tmp_path / "m.pt2", X, dynamic_size=True)
    assert not list(tmp_path.iterdir())


# --- Examples by name ------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A net of which a call may leave out the argument in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(
        self, x: Tensor, flag: bool = False, mask: Tensor | None = None, *, scale: Tensor | None = None
    ) -> Tensor:
        """Return what `mask` leaves: ``(batch, 4, height, width)``."""
        y: Tensor = self.conv(-x if flag else x)
        y = y if mask is None else y * mask
        return y if scale is None else y - scale


MASK, SCALE = X.cos()[:, :1], X.cos()[:, :1, :1, :1]


@pytest.mark.parametrize("export", [repfx.export_program, repfx.export_onnx])
@pytest.mark.parametrize(
    "example",
    [{"x": X, "mask": MASK}, {"mask": MASK, "x": X}, {"scale": SCALE, "x": X}, {"mask": MASK, "scale": SCALE, "x": X}],
    ids=", ".join,
)
def test_inputs_by_name_come_in_any_order(example: dict[str, Tensor], export: Any, tmp_path: Path) -> None:
    model = ready(Masked())
    file = tmp_path / ("m.pt2" if export is repfx.export_program else "m.onnx")
    dtype = torch.float32 if export is repfx.export_onnx else None
    assert export(model, file, example, dtype=dtype).max_error < 1e-5
    if dtype is None:
        assert relative_error(loaded(file)(**example), model(**example)) < 1e-12

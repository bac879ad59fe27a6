"""Files that say how images are prepared, or prepare them inside, held against torchvision's transforms."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

import repfx
from repfx.data.image_files import stages_of
from repfx.errors import ExportError, InvalidInput
from repfx.onnx.metadata import Metadata, weights_digest
from repfx.onnx.preprocessing import Preprocessing
from repfx.testing import randomize_batch_norm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = Preprocessing((3, 32, 32), MEAN, STD, 255.0, "crop", 0.875)
STRETCH = Preprocessing((3, 20, 28), (120.0, 110.0, 100.0), (60.0, 50.0, 55.0))
LABELS = ("cat", "dog", 'it\'s a "bird"', "ä")


class Net(nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.conv(x)).relu().mean((2, 3)))
        return logits


class Pixels(nn.Module):
    """Gives the input itself, one row for each image, so that preparation can be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, groups=3, bias=False)
        nn.init.ones_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        pixels: Tensor = self.conv(x).flatten(1)
        return pixels


def net(channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = Net(channels).eval()
    randomize_batch_norm(model)
    return model


def run(path: Path, x: Any) -> Any:
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {"images": x})[0]


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Make a picture as smooth as a photo."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 7 + 2, width // 7 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def levels(difference: Any, preprocessing: Preprocessing) -> Any:
    """Return differences between inputs in levels of raw pixels."""
    scale = np.array(preprocessing.std)[:, None, None] * preprocessing.divisor
    return np.abs(difference) * scale


def test_a_plain_script_finds_all_it_needs_in_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = repfx.expand(net(), "dbb")
    about = {"source": "here", "license": "mit"}
    repfx.export_onnx(model, path, torch.randn(2, 3, 32, 32), labels=LABELS, preprocessing=CROP, about=about)
    session = onnxruntime.InferenceSession(path)
    assert [each.name for each in session.get_inputs()] == ["images"]
    assert [each.name for each in session.get_outputs()] == ["logits"]
    found = session.get_modelmeta().custom_metadata_map
    assert ast.literal_eval(found["names"]) == dict(enumerate(LABELS))  # as ultralytics reads it
    assert (ast.literal_eval(found["imgsz"]), found["task"]) == ([32, 32], "classify")
    assert json.loads(found["id2label"]) == {str(place): name for place, name in enumerate(LABELS)}
    assert (found["source"], found["license"]) == ("here", "mit")
    assert [action["action"] for action in json.loads(found["journal"])] == ["expand"]
    assert found["weights_sha256"] == weights_digest(onnx.load(path))

    processor = json.loads(found["preprocessor_config"])
    image = photo(40, 61)
    shorter, size = processor["size"]["shortest_edge"], processor["crop_size"]["height"]
    resized = image.resize((61 * shorter // 40, shorter), processor["resample"])
    left, top = (round((side - size) / 2) for side in resized.size)
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)), np.float32) * processor["rescale_factor"]
    x = ((pixels - processor["image_mean"]) / processor["image_std"]).astype(np.float32).transpose(2, 0, 1)[None]
    expected = stages_of(CROP)(image)
    assert np.abs(x[0] - expected.numpy()).max() < 1e-5
    logits = model.eval()(expected[None]).detach().numpy()
    assert np.abs(run(path, x) - logits).max() < 1e-4 * np.abs(logits).max()

    read = Metadata.read(path)
    assert (read.labels, read.preprocessing, read.inside) == (LABELS, CROP, False)


@pytest.mark.slow
@pytest.mark.one_in(2)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_file_prepares_images_as_torchvision_does(interpolation: str, tmp_path: Path) -> None:
    preprocessing = Preprocessing((3, 32, 32), MEAN, STD, 255.0, "crop", 0.875, interpolation)
    path = tmp_path / "m.onnx"
    x = torch.randn(2, 3, 32, 32)
    repfx.export_onnx(Pixels(), path, x, preprocessing=preprocessing, inside=True)
    fit = [v2.Resize(37, v2.InterpolationMode(interpolation)), v2.CenterCrop(32)]
    floats = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transforms = v2.Compose([*fit, *floats])
    for size in ((71, 96), (97, 70), (32, 45), (20, 33), (37, 37), (300, 401)):
        image = photo(*size)
        found = run(path, np.asarray(image)[None]).reshape(3, 32, 32)
        raw = torch.from_numpy(np.array(image))
        expected = transforms(image).numpy()
        for ours in (found, preprocessing(raw[None])[0].numpy(), stages_of(preprocessing)(image).numpy()):
            off = levels(ours - expected, preprocessing)
            assert off.max() < 3.5  # PIL rounds to bytes after each axis, torch and ONNX once
            assert off.mean() < 0.3


@pytest.mark.slow
def test_a_stretched_image_is_that_of_training(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    repfx.export_onnx(Pixels(), path, torch.randn(2, 3, 20, 28), preprocessing=STRETCH, inside=True)
    for size in ((20, 28), (41, 30), (9, 50)):
        image = photo(*size)
        raw = torch.from_numpy(np.array(image))
        found = run(path, raw[None].numpy()).reshape(3, 20, 28)
        for expected in (STRETCH(raw[None])[0], stages_of(STRETCH)(image)):
            assert levels(found - expected.numpy(), STRETCH).max() < 1e-3


@pytest.mark.slow
@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("channels", [1, 3])
def test_probabilities_of_raw_images(channels: int, dtype: torch.dtype | None, tmp_path: Path) -> None:
    preprocessing = Preprocessing((channels, 16, 16), MEAN[:channels], STD[:channels], 255.0, "crop")
    path = tmp_path / "m.onnx"
    model = net(channels)
    x = torch.randn(2, channels, 16, 16)
    options: dict[str, Any] = {"preprocessing": preprocessing, "inside": True, "probabilities": True, "dtype": dtype}
    report = repfx.export_onnx(model, path, x, labels=LABELS, **options)
    assert [str(each) for each in report.inputs] == [f"images: uint8 [batch, height, width, {channels}]"]
    assert [each.name for each in report.outputs] == ["probabilities"]
    raw = torch.randint(256, (3, 16, 21, channels), dtype=torch.uint8)
    found = run(path, raw.numpy())
    expected = model(preprocessing(raw)).softmax(1).detach().numpy()
    assert np.abs(found - expected).max() < (1e-5 if dtype is None else 1e-2)
    assert Metadata.read(path).inside


@pytest.mark.slow
def test_a_file_holds_no_path_of_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    repfx.export_onnx(net(), path, torch.randn(2, 3, 9, 7))
    folders = {str(Path(module.__file__ or "").parents[1]) for module in (torch, repfx, np)} | {str(tmp_path)}
    data = path.read_bytes()
    assert not [folder for folder in folders if folder.encode() in data]
    assert not re.findall(rb"\.py", data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inside": True}, "give preprocessing, too"),
        ({"labels": ("a", "b")}, "there are 2 labels, and the model gives 4 numbers"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        repfx.export_onnx(net(), tmp_path / "m.onnx", torch.randn(2, 3, 32, 32), **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_only_a_classifier_gives_probabilities(tmp_path: Path) -> None:
    conv = nn.Conv2d(3, 4, 3)
    with pytest.raises(InvalidInput, match="this one gives \\(2, 4, 7, 5\\)"):
        repfx.export_onnx(conv, tmp_path / "m.onnx", torch.randn(2, 3, 9, 7), probabilities=True)
    repfx.export_onnx(conv, tmp_path / "m.onnx", torch.randn(2, 3, 9, 7), labels=("a", "b"))  # for what reads them
    assert Metadata.read(tmp_path / "m.onnx").labels == ("a", "b")


@pytest.mark.slow
def test_an_old_opset_can_not_resize_as_training_did(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="needs opset 18 or newer, and this file has 17"):
        repfx.export_onnx(
            net(), tmp_path / "m.onnx", torch.randn(2, 3, 32, 32), preprocessing=CROP, inside=True, opset=17
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_that_prepares_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Preprocessing, images: Tensor) -> Tensor:
        return self.normalized(self.fitted(images[0].movedim(-1, 0).flip(0)))[None].expand(2, -1, -1, -1)

    monkeypatch.setattr(Preprocessing, "__call__", wrong)
    with pytest.raises(ExportError, match="the file prepares images otherwise than torch: off by"):
        repfx.export_onnx(net(), tmp_path / "m.onnx", torch.randn(2, 3, 32, 32), preprocessing=CROP, inside=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.5,)}, "there are 1 means and 3 deviations; the 3 channels need one each"),
        ({"std": (0.0, 1.0, 1.0)}, "a deviation or the divisor isn't above 0"),
        ({"crop": 1.5}, "crop is 1.5"),
        ({"interpolation": "nearest"}, "must be bilinear or bicubic"),
        ({"shape": (3, 32, 30)}, "a crop is as high as it is wide"),
        ({"shape": ()}, "it must be whole numbers from 1"),
        ({"value_range": (1.0, 1.0)}, "it must be a least and a greater number"),
    ],
)
def test_a_preprocessing_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Preprocessing(**{**CROP.as_dict(), **change})

"""`repfx predict` and `repfx evaluate`, on a net that tells colours apart."""

import json
from pathlib import Path

import numpy
import onnxruntime
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

import repfx
from repfx.data.dataset import DataSource
from repfx.errors import InvalidInput
from repfx.onnx.preprocessing import Preprocessing
from repfx.training.classifier import Classifier
from repfx.training.evaluation import evaluate

LABELS = ("blue", "green", "red", "grey")
COLOURS = {"blue": (20, 30, 250), "green": (10, 240, 20), "red": (250, 0, 10), "grey": (90, 90, 90)}
PREPARED = Preprocessing((3, 8, 8), (0.5, 0.4, 0.3), (0.25, 0.3, 0.35), 255.0, "crop", 0.8)


class ColourNet(nn.Module):
    """Undoes the normalization, and scores blue, green, red, and grey by a threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        scores = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
        self.conv.weight.data = (scores * torch.tensor(PREPARED.std)).reshape(4, 3, 1, 1)
        self.conv.bias.data = scores @ torch.tensor(PREPARED.mean) + torch.tensor([0, 0, 0, 0.6])  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.conv(x).mean((2, 3))
        return scores


def write_colours(path: Path, **colour_of: str) -> Path:
    for name, colour in colour_of.items():
        (path / name).mkdir(parents=True)
        for place in range(5):
            Image.new("RGB", (9 + place, 12), COLOURS[colour]).save(path / name / f"{place}.png")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    forms = {"plain": {}, "raw": {"inside": True, "probabilities": True}, "half": {"dtype": torch.float16}}
    for name, options in forms.items():
        repfx.export_onnx(
            ColourNet(),
            folder / f"{name}.onnx",
            torch.randn(2, 3, 8, 8),
            labels=LABELS,
            preprocessing=PREPARED,
            **options,  # type: ignore[arg-type]
        )
    repfx.export_onnx(ColourNet(), folder / "unlabelled.onnx", torch.randn(2, 3, 8, 8), preprocessing=PREPARED)
    repfx.export_onnx(ColourNet(), folder / "unprepared.onnx", torch.randn(2, 3, 8, 8), labels=LABELS)
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.one_in(3)
@pytest.mark.parametrize("form", ["plain", "raw", "half"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_file_is_evaluated_on_a_part_of_its_classes(  # type: ignore[no-untyped-def]
    form: str, runtime: str, files: dict[str, Path], tmp_path: Path, repfx_command
) -> None:
    data = write_colours(tmp_path, grey="grey", red="red", green="blue")
    outcome = repfx_command("evaluate", files[form], "--data", data, "--runtime", runtime, "--json")
    found = json.loads(outcome.out)
    assert (found["images"], found["by_class"]) == (3, {"green": 0.0, "red": 1.0, "grey": 1.0})
    assert found["confusion"] == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert found["accuracy"] == pytest.approx(2 / 3)


def test_the_table_of_an_evaluation(files: dict[str, Path], tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    data = write_colours(tmp_path, red="red", green="blue")
    outcome = repfx_command("evaluate", files["plain"], "--data", data, "--against", files["raw"])
    assert "50.00% of 2 images right." in outcome.out
    assert "The other classifier puts 0 images into another class." in outcome.out
    assert "Mistaken most often: green for blue (1)." in outcome.out
    assert "blue" not in outcome.out.split("green")[0]  # a class without images has no row


@pytest.mark.parametrize("form", ["plain", "raw"])
def test_images_are_predicted(form: str, files: dict[str, Path], tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    data = write_colours(tmp_path, red="red", grey="grey")
    paths = [data / "red" / "1.png", data / "grey" / "2.png"]
    rows = json.loads(repfx_command("predict", files[form], *paths, "--top", 2, "--json").out)
    assert [row["classes"][0]["class"] for row in rows] == ["red", "grey"]
    assert [row["image"] for row in rows] == list(map(str, paths))
    scores = torch.tensor([20 / 255 * 0 + 10 / 255, 0.0, 250 / 255, 0.6]).softmax(0)
    assert rows[0]["classes"][0]["probability"] == pytest.approx(scores[2].item(), abs=1e-3)
    assert [len(row["classes"]) for row in rows] == [2, 2]
    assert "red" in repfx_command("predict", files[form], paths[0]).out


def test_what_can_not_be_used_is_named(files: dict[str, Path], tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "no.png").write_text("no image")
    data = write_colours(tmp_path / "data", red="red", cyan="blue")
    cases = [
        (("predict", files["plain"], tmp_path / "no.png"), "no.png' can't be read as an image"),
        (("predict", tmp_path / "no.onnx", tmp_path / "no.png"), "there is no file"),
        (("predict", tmp_path / "no.png", tmp_path / "no.png"), "is neither an ONNX file nor the folder"),
        (("evaluate", files["unlabelled"], "--data", data), "doesn't say what its classes are"),
        (("evaluate", files["unprepared"], "--data", data), "doesn't say how images are prepared"),
        (("evaluate", files["plain"], "--data", data), "has classes of unknown names: cyan"),
        (
            ("evaluate", files["plain"], "--data", "digits"),
            "whose pixels go from 0 to 255; those of 'digits' go from 0 to 16",
        ),
        (("evaluate", files["plain"], "--data", data, "--runtime", "x"), "runtime"),
    ]
    for arguments, message in cases:
        outcome = repfx_command(*arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err


@pytest.mark.slow
def test_classifiers_of_other_classes_are_not_compared(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    repfx.export_onnx(ColourNet(), path, torch.randn(2, 3, 8, 8), labels=LABELS[::-1], preprocessing=PREPARED)
    plain, other = (Classifier.open(str(each)) for each in (files["plain"], path))
    with pytest.raises(InvalidInput, match="have different classes"):
        evaluate(plain, DataSource(str(tmp_path)), other)


@pytest.mark.slow
def test_a_plain_script_and_a_raw_file_reach_the_accuracy_of_the_run(tmp_path: Path, repfx_command) -> None:  # type: ignore[no-untyped-def]
    digits = load_digits()
    for place, (pixels, label) in enumerate(zip(digits.images, digits.target)):
        folder = tmp_path / "data" / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype(numpy.uint8)).resize((19, 22)).save(folder / f"{place:04}.png")
    out = tmp_path / "run"
    arguments = ["train", "--model", "timm:test_resnet", "--data", tmp_path / "data", "--image-size", 16, "--epochs", 3]
    assert repfx_command(*arguments, "--spec", "repvgg", "--out", out).code == 0
    accuracy = json.loads((out / "metrics.json").read_text())["accuracy"]["onnxruntime"]
    assert accuracy > 0.7
    evaluated = json.loads(repfx_command("evaluate", out / "model.onnx", "--data", tmp_path / "data", "--json").out)
    assert evaluated["accuracy"] == accuracy
    assert repfx_command("fuse", out, "--onnx", tmp_path / "raw.onnx", "--raw-images", "--probabilities").code == 0

    plain, raw = (onnxruntime.InferenceSession(path) for path in (out / "model.onnx", tmp_path / "raw.onnx"))
    metadata = plain.get_modelmeta().custom_metadata_map
    rules, names = json.loads(metadata["preprocessing"]), json.loads(metadata["id2label"])
    right = {"plain": 0, "raw": 0}
    tested = [path for folder in sorted((tmp_path / "data").iterdir()) for path in sorted(folder.iterdir())[4::5]]
    for path in tested:
        with Image.open(path) as image:
            colours = image.convert("RGB")
        size = rules["shape"][1]
        shorter = round(size / rules["crop"])
        sides = [side * shorter // min(colours.size) for side in colours.size]
        pixels = numpy.asarray(colours.resize(sides, Image.Resampling.BILINEAR), numpy.float32)
        top, left = (round((side - size) / 2) for side in (sides[1], sides[0]))
        shown = pixels[top : top + size, left : left + size] / rules["divisor"]
        x = ((shown - rules["mean"]) / rules["std"]).astype(numpy.float32).transpose(2, 0, 1)[None]
        answers = {
            "plain": plain.run(None, {"images": x})[0],
            "raw": raw.run(None, {"images": numpy.asarray(colours)[None]})[0],
        }
        for name, answer in answers.items():
            right[name] += names[str(answer.argmax())] == path.parent.name
    assert right["plain"] / len(tested) == accuracy
    assert abs(right["raw"] / len(tested) - accuracy) < 0.01  # resizing rounds a little differently

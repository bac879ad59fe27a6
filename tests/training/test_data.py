"""Data sets by name: their split, their form, and the errors about those that can't be used."""

from __future__ import annotations

import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from repfx.data.augmentation import Augmentation
from repfx.data.dataset import DataSet, DataSource, InputForm
from repfx.data.load import load_data
from repfx.errors import InvalidInput
from repfx.onnx.preprocessing import Preprocessing
from repfx.training.recipe_file import parse_recipe

GREY = InputForm(channels=1)


def stacked(images: Any) -> Tensor:
    return torch.stack([images[index][0] for index in range(len(images))])


def preprocessing_of(data: DataSet) -> Preprocessing:
    assert data.preprocessing is not None
    return data.preprocessing


def test_the_digits_are_all_there_and_split_by_class() -> None:
    data = load_data(DataSource("digits"), GREY)
    train, test = (Counter(int(y) for _, y in part) for part in (data.train, data.test))  # type: ignore[attr-defined]
    assert sum(train.values()) + sum(test.values()) == 1797
    assert all(test[digit] == (train[digit] + test[digit]) // 5 for digit in range(10))


def test_the_digits_are_standardized_by_the_training_images() -> None:
    data = load_data(DataSource("digits"), InputForm(channels=1, size=8))
    images = stacked(data.train)
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    prepared = preprocessing_of(data)
    raw = images[0] * prepared.std[0] + prepared.mean[0]
    assert torch.allclose(raw, raw.round(), atol=1e-4)
    assert raw.max() <= 16.001


def test_the_digits_get_the_size_and_channels_of_the_model() -> None:
    data = load_data(DataSource("digits"), InputForm(channels=3, size=20))
    assert data.example_shape == (3, 20, 20)
    assert torch.equal(data.test[0][0][0], data.test[0][0][2])


def write_arrays(path: Path, **changes: Any) -> Path:
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.normal(size=(12, 6, 6)).astype("float32"),
        "y_train": np.arange(12) % 3,
        "x_test": generator.normal(size=(6, 6, 6)).astype("float32"),
        "y_test": np.arange(6) % 3,
    } | changes
    np.savez(path / "data.npz", **{name: value for name, value in arrays.items() if value is not None})
    return path / "data.npz"


def load_arrays(path: Path, form: InputForm) -> DataSet:
    return load_data(DataSource(str(path)), form)


@pytest.mark.parametrize(
    ("shape", "form", "expected"),
    [
        ((6, 6), GREY, (1, 6, 6)),
        ((6, 6), InputForm(3), (3, 6, 6)),
        ((3, 6, 6), InputForm(3), (3, 6, 6)),
        ((6, 6, 3), InputForm(3), (3, 6, 6)),
        ((3, 6, 6), GREY, (1, 6, 6)),
        ((4, 9), InputForm(4, dimensions=1), (4, 9)),
        ((9,), InputForm(1, dimensions=1, size=5), (1, 5)),
        ((2, 4, 4, 4), InputForm(2, dimensions=3), (2, 4, 4, 4)),
    ],
)
def test_arrays_take_the_form_of_the_model(
    shape: tuple[int, ...], form: InputForm, expected: tuple[int, ...], tmp_path: Path
) -> None:
    arrays = {name: np.random.rand(count, *shape) for name, count in (("x_train", 12), ("x_test", 6))}
    data = load_arrays(write_arrays(tmp_path, **arrays), form)
    assert data.example_shape == expected
    assert data.classes == ("0", "1", "2")


def test_channels_last_keeps_each_pixel() -> None:
    from repfx.data.load import _channels_first

    x = torch.arange(2 * 4 * 5 * 3.0).reshape(2, 4, 5, 3)
    assert torch.equal(_channels_first(x, InputForm(3), Path())[1, 2], x[1, :, :, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"y_train": np.arange(5)}, "one label for each"),
        ({"y_train": np.linspace(0, 1, 12)}, "whole numbers"),
        ({"y_train": np.arange(12) - 1}, "whole numbers"),
        ({"x_test": np.full((6, 6, 6), np.nan)}, "not finite"),
        ({"x_train": np.zeros((12, 6))}, "has images"),
        ({"x_train": np.zeros((12, 2, 6, 6)), "x_test": np.zeros((6, 2, 6, 6))}, "2 channels"),
        ({"x_train": np.array([None] * 12)}, "can't be read as arrays"),
    ],
)
def test_malformed_arrays_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        load_arrays(write_arrays(tmp_path, **changes), InputForm(3))


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(b"no archive")
    with pytest.raises(InvalidInput, match="can't be read as arrays"):
        load_arrays(tmp_path / "data.npz", GREY)


def write_images(path: Path, count: int, classes: str = "ab") -> None:
    for position, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (12, 10), (100 * position, index, 0)).save(path / name / f"{index}.png")


def test_a_folder_of_classes_is_split(tmp_path: Path) -> None:
    write_images(tmp_path, 6)
    data = load_data(DataSource(str(tmp_path)), InputForm(3, size=8))
    assert (len(data.train), len(data.test)) == (10, 2)  # type: ignore[arg-type]
    assert data.classes == ("a", "b")
    assert data.example_shape == (3, 8, 8)


def test_the_middle_of_an_image_is_shown_and_a_random_crop_takes_the_whole(tmp_path: Path) -> None:
    pixels = np.full((16, 16, 3), 255, np.uint8)
    pixels[4:12, 4:12] = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(5):
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    data = load_data(DataSource(str(tmp_path), crop=0.5), InputForm(3, size=8))
    middle = torch.arange(64).reshape(8, 8) / 255
    prepared = preprocessing_of(data)
    shown = data.test[0][0][0] * prepared.std[0] + prepared.mean[0]
    assert torch.allclose(shown, middle, atol=1e-6)
    assert prepared.crop == 0.5
    varied = Augmentation(resized_crop=1.0).of_images(data.train, 0)[0][0][0]
    assert varied.shape == shown.shape
    assert varied.max() > 2 > data.test[0][0].max()
    with pytest.raises(InvalidInput, match=r"crop is 1\.5; it must be"):
        DataSource("digits", crop=1.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_standardized_as_those_of_imagenet(channels: int, tmp_path: Path) -> None:
    """Weights of other libraries expect these numbers, so they are compared with timm's."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(5):
            Image.new("RGB", (9, 8), (51, 102, 204)).save(tmp_path / name / f"{index}.png")
    data = load_data(DataSource(str(tmp_path)), InputForm(channels, size=6))
    mean, deviation = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    pixel = torch.tensor([0.2, 0.4, 0.8])
    if channels == 1:
        pixel = (pixel * torch.tensor([0.299, 0.587, 0.114])).sum()
        mean, deviation = mean.mean(), deviation.mean()
    expected = ((pixel - mean) / deviation).reshape(-1, 1, 1).expand(channels, 6, 6)
    assert (data.test[0][0] - expected).abs().max() < (1e-6 if channels == 3 else 1e-2)  # grey is rounded to bytes
    prepared = preprocessing_of(data)
    assert prepared.mean == pytest.approx(mean.reshape(-1).tolist(), abs=1e-3)
    assert prepared.std == pytest.approx(deviation.reshape(-1).tolist(), abs=1e-3)


def test_a_folder_with_parts_keeps_them(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "val", 1)
    data = load_data(DataSource(str(tmp_path)), InputForm(1, size=8))
    assert (len(data.train), len(data.test)) == (6, 2)  # type: ignore[arg-type]
    assert data.example_shape == (1, 8, 8)


def test_parts_and_classes_that_are_missing_are_told(tmp_path: Path) -> None:
    """A folder with one part is refused. Otherwise the part would count as the only class, and every answer would be right."""
    write_images(tmp_path / "parts" / "train", 5)
    with pytest.raises(
        InvalidInput, match="a folder train/ of classes, and beside it none of test, val, valid, validation"
    ):
        load_data(DataSource(str(tmp_path / "parts")), InputForm(3))
    write_images(tmp_path / "one", 5, "a")
    with pytest.raises(InvalidInput, match="has one class alone, 'a'"):
        load_data(DataSource(str(tmp_path / "one")), InputForm(3))


def test_folders_that_can_not_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no image folder: it has no folders of images"):
        load_data(DataSource(str(tmp_path)), InputForm(3))
    write_images(tmp_path / "train", 1)
    write_images(tmp_path / "test", 1, "ac")
    with pytest.raises(InvalidInput, match="for training than for testing: train/ alone has b; test/ alone has c"):
        load_data(DataSource(str(tmp_path)), InputForm(3))
    with pytest.raises(InvalidInput, match="1 or 3 channels"):
        load_data(DataSource(str(tmp_path)), InputForm(5))


def test_too_few_images_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    with pytest.raises(InvalidInput, match="too few images"):
        load_data(DataSource(str(tmp_path)), InputForm(3))


def write_mnist(root: Path) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 4), ("t10k", 2)):
        pixels = bytes(range(256)) * 28 * 28
        images = struct.pack(">IIII", 2051, count, 28, 28) + pixels[: count * 28 * 28]
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(range(count)))


def test_a_torchvision_data_set_is_read_from_its_root(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = load_data(DataSource("mnist", tmp_path), GREY)
    assert (len(data.train), len(data.test), len(data.classes)) == (4, 2, 10)  # type: ignore[arg-type]
    assert data.example_shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR10", "put it there, name another --root, or let --download fetch it"),
        ("imagenet", "name another --root, or give --data a folder with one folder per class"),
        ("CocoDetection", "no training and test"),
        ("nix", "no data set"),
    ],
)
def test_what_is_not_there_is_said(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        load_data(DataSource(name, tmp_path), InputForm(3))


def test_a_model_without_convs_has_no_form() -> None:
    with pytest.raises(InvalidInput, match="has no conv"):
        InputForm.of(nn.Linear(2, 2))


# --- data of other libraries ------------------------------------------------------------------------------------------


def test_data_for_datasets_names_its_extra_where_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidInput, match=r"need datasets, which is missing: pip install 'repfx\[datasets\]'"):
        load_data(DataSource("hf:anything"), GREY)


@pytest.mark.parametrize("name", ["digits", "photographs.npz", "CIFAR10"])
def test_data_without_options_refuses_them(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"data.options has label, and '{name}' takes no options: leave them out"):
        load_data(DataSource(name, options={"label": "fine"}), GREY)


def test_a_folder_in_a_recipe_starts_from_the_recipe_whatever_loads_it(tmp_path: Path) -> None:
    (tmp_path / "photographs").mkdir()
    for name, found in (
        ("hf:photographs", f"hf:{tmp_path / 'photographs'}"),
        ("wds:photographs", f"wds:{tmp_path / 'photographs'}"),
        ("photographs", str(tmp_path / "photographs")),
        ("hf:elsewhere", "hf:elsewhere"),
    ):
        (tmp_path / "recipe.toml").write_text(f'[data]\nname = "{name}"\n')
        assert parse_recipe(tmp_path / "recipe.toml")["data"]["name"] == found

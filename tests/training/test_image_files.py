"""Image files as they come: every mode right or refused by name, and one broken file ends no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repfx.data.dataset import DataSource, InputForm, part_of
from repfx.data.load import load_data
from repfx.data.reading import ImageFiles, encoded_in, read_image
from repfx.errors import InvalidInput
from repfx.training.loop import Watcher, train
from repfx.training.recipe import Recipe
from tests.tiny import net

ORIENTATION = 0x0112


def picture(value: int = 0, mode: str = "RGB") -> Image.Image:
    """An image of 8 × 6, bright at the left."""
    pixels = np.full((6, 8, 3), value, np.uint8)
    pixels[:, :3] += 100
    return Image.fromarray(pixels).convert(mode)


def folder(root: Path, count: int = 10) -> Path:
    for name, value in (("dark", 0), ("light", 120)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(value).save(root / name / f"{number}.png")
    return root


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def pixels(path: Path) -> Any:
    return np.asarray(read_image(path))


# --- modes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_an_image_of_8_bits_is_what_it_looks_like(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    picture(0, mode).save(path, quality=100)  # which counts for JPEG alone
    found = read_image(path)
    assert found.mode == ("L" if mode in ("1", "L", "LA") else "RGB")
    expected = np.asarray(picture(0, mode).convert(found.mode), dtype=int)
    assert abs(np.asarray(found, dtype=int) - expected).max() <= (3 if path.suffix == ".jpg" else 0)


def test_a_palette_with_transparency_loses_it_in_silence(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    image = picture(0).quantize(4)
    image.info["transparency"] = bytes([0, 255, 255, 255])
    image.save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(picture(0)))
    assert not recwarn.list


@pytest.mark.parametrize(("name", "order"), [("a.png", "<u2"), ("a.tif", "<u2"), ("b.tif", ">u2")])
def test_16_bits_become_8(name: str, order: str, tmp_path: Path) -> None:
    """Taken as they are, nearly all values would be white."""
    values = np.linspace(0, 65535, 48).round().astype(order).reshape(6, 8)
    Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(pixels(tmp_path / name), (values / 257).round().astype(np.uint8))


@pytest.mark.parametrize(("kind", "said"), [("float32", "floats"), ("int32", "whole numbers of 32 bits")])
def test_pixels_without_a_known_range_are_refused(kind: str, said: str, tmp_path: Path) -> None:
    Image.fromarray(np.ones((6, 8), kind)).save(tmp_path / "a.tif")
    with pytest.raises(InvalidInput, match=f"its pixels are {said}, whose range isn't known"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_camera_says(orientation: int, tmp_path: Path) -> None:
    """Each stored image shows the same picture once it is turned (EXIF 2.3, table 6)."""
    upright = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), upright)


def test_training_and_prediction_see_the_same_image(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", 5)
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    picture(0).save(root / "dark" / "4.png", exif=exif)  # the fifth is a test image
    data = load_data(DataSource(str(root)), InputForm(3, size=8))
    right = data.test[0][0][:, :, 4:].mean() > data.test[0][0][:, :, :4].mean()
    assert right


# --- broken files --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A truncated, an empty, a huge file, a text and a link to nothing are among the test images, one of them is left."""
    root = folder(tmp_path / "data", 30)
    tests = [root / "dark" / f"{number}.png" for number in sorted(range(30), key=str)[4::5]]
    truncate(tests[0])
    tests[1].write_bytes(b"")
    tests[2].write_text("<html>not found</html>")
    tests[3].unlink()
    tests[3].symlink_to(root / "gone.png")
    Image.new("L", (300, 300)).save(tests[4])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    data = load_data(DataSource(str(root)), InputForm(3, size=8))
    assert {Path(path).name for path in data.unreadable} == {path.name for path in tests[:5]}
    reasons = [data.unreadable[str(path)] for path in tests[:5]]
    for reason, said in zip(
        reasons, ("truncated", "cannot identify", "cannot identify", "No such file", "exceeds limit")
    ):
        assert said in reason
    assert [int(data.test[index][1]) for index in range(len(data.test))] == [0] + [1] * 6  # type: ignore[arg-type]
    assert len(data.train) == 48  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_broken_training_image_is_told_and_replaced_by_its_neighbour(workers: int, tmp_path: Path) -> None:
    root = folder(tmp_path / "data", 10)
    for number in (2, 3):
        truncate(root / "dark" / f"{number}.png")
    data = load_data(DataSource(str(root)), InputForm(1, size=8))
    notices: list[str] = []
    recipe = Recipe(epochs=2, batch_size=16, workers=workers)
    trained = train(net(2), data, recipe, watcher=Watcher(on_notice=notices.append))
    assert sorted(Path(path).name for path in trained.unreadable) == ["2.png", "3.png"]
    (told,) = notices
    assert told.startswith("2 training images can't be read and are left out: ")
    assert str(root / "dark" / "2.png") in told
    assert "image file is truncated" in told
    files = encoded_in(part_of(data.train, [0, 1]))
    assert files is not None
    places = [path.endswith("dark/2.png") for path in files.paths]
    image, label = files[places.index(True)]
    assert (label, files.paths[places.index(True) + 2][-10:]) == (0, "dark/5.png")  # 4.png is a test image
    assert np.array_equal(np.asarray(image), np.asarray(picture(0)))


def test_a_resumed_training_knows_what_was_left_out_before(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", 10)
    truncate(root / "dark" / "2.png")
    data, recipe = load_data(DataSource(str(root)), InputForm(1, size=8)), Recipe(epochs=1, batch_size=16)
    state = tmp_path / "state.safetensors"
    once, again = (train(net(2), data, recipe, checkpoint=state, resume=resume) for resume in (False, True))
    assert [Path(path).name for path in once.unreadable] == ["2.png"]
    assert again.unreadable == once.unreadable  # although it had no epoch left


def test_what_was_told_before_is_not_told_again(tmp_path: Path) -> None:
    root, notices = folder(tmp_path), list[str]()
    truncate(root / "dark" / "0.png")
    data = load_data(DataSource(str(root)), InputForm(1, 2, 8))
    first = train(net(2), data, Recipe(epochs=1, batch_size=8))
    assert len(first.unreadable) == 1
    watcher = Watcher(on_notice=notices.append)
    again = train(net(2), data, Recipe(epochs=1, batch_size=8), watcher=watcher, unreadable=first.unreadable)
    assert notices == []
    assert again.unreadable == first.unreadable


def test_a_broken_image_is_replaced_within_its_class(tmp_path: Path) -> None:
    root = folder(tmp_path, 3)
    (root / "dark" / "2.png").write_bytes(b"")  # the last one, after which come those of the other class
    files = ImageFiles(
        [
            (str(root / name / f"{number}.png"), label)
            for label, name in enumerate(("dark", "light"))
            for number in range(3)
        ]
    )
    image, label = files[2]
    assert label == 0
    assert np.array_equal(np.asarray(image), np.asarray(picture(0)))
    assert files.unreadable == [str(root / "dark" / "2.png")]


def test_a_class_without_any_readable_image_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    files = ImageFiles([(str(path), 0)])
    with pytest.raises(InvalidInput, match=r"no other image can be read of the class of '.*a.png', nor can this one"):
        files[0]
    root = folder(tmp_path / "data", 5)
    for name in ("dark", "light"):
        truncate(root / name / "4.png")
    with pytest.raises(InvalidInput, match=r"2 test images can't be read .*: none is left"):
        load_data(DataSource(str(root)), InputForm(1, size=8))


# --- links ---------------------------------------------------------------------------------------------------------------


def test_links_to_classes_and_files_are_followed(tmp_path: Path) -> None:
    root = folder(tmp_path / "there", 10)
    (tmp_path / "data" / "light").mkdir(parents=True)
    (tmp_path / "data" / "dark").symlink_to(root / "dark", target_is_directory=True)
    for path in (root / "light").iterdir():
        (tmp_path / "data" / "light" / path.name).symlink_to(path)
    data, plain = (load_data(DataSource(str(each)), InputForm(1, size=8)) for each in (tmp_path / "data", root))
    assert len(data.train) == len(plain.train) == 16  # type: ignore[arg-type]
    assert all(torch.equal(data.train[index][0], plain.train[index][0]) for index in range(16))


@pytest.mark.parametrize("indirect", [False, True])
def test_a_link_that_leads_in_a_circle_is_refused(indirect: bool, tmp_path: Path) -> None:
    """Followed, it would count each image some forty times."""
    root = folder(tmp_path / "data", 10)
    target = root
    if indirect:
        target = tmp_path / "other"
        target.mkdir()
        (target / "back").symlink_to(root, target_is_directory=True)
    (root / "dark" / "link").symlink_to(target, target_is_directory=True)
    with pytest.raises(InvalidInput, match=r"leads back to '.*/data', which holds it: remove this link"):
        load_data(DataSource(str(root)), InputForm(1, size=8))


def test_a_class_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", 10)
    (root / "red").symlink_to(tmp_path / "gone", target_is_directory=True)
    with pytest.raises(InvalidInput, match="red' is a link that leads nowhere"):
        load_data(DataSource(str(root)), InputForm(1, size=8))

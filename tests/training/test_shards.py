"""Shards of WebDataset: read like folders of images, whatever lies in them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from repfx.cli import main
from repfx.data.dataset import DataSet, DataSource, InputForm, labels_of
from repfx.data.load import load_data
from repfx.errors import InvalidInput
from repfx.training.loop import Watcher, train
from repfx.training.recipe import Recipe
from tests.tiny import net
from tests.training.test_image_files import picture

FORM = InputForm(1, size=8)
TINY = f"{Path(__file__).parents[1] / 'tiny.py'}:net"
Files = Sequence[tuple[str, bytes]]


def png(value: int) -> bytes:
    stream = io.BytesIO()
    picture(value).save(stream, "png")
    return stream.getvalue()


def samples(count: int, begin: int = 0, classes: Sequence[str] = ("0", "1")) -> list[tuple[str, bytes]]:
    """An image and the file of its class for each sample; the class of an odd one is the second, and it is light."""
    pairs = (
        [(f"{row:04}.png", png(row % 2 * 120 + row)), (f"{row:04}.cls", classes[row % 2].encode())]
        for row in range(begin, begin + count)
    )
    return [file for pair in pairs for file in pair]


def shard(path: Path, files: Files, mode: Any = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def loaded(folder: Path, **how: Any) -> DataSet:
    return load_data(DataSource(f"wds:{folder}", **how), FORM)


def test_shards_hold_images_like_those_of_a_folder(tmp_path: Path) -> None:
    shard(tmp_path / "wds" / "train-0.tar", samples(6))
    shard(tmp_path / "wds" / "train-1.tar", samples(4, begin=6))
    shard(tmp_path / "wds" / "val-0.tar", samples(4, begin=20))
    for part, count, begin in (("train", 10, 0), ("test", 4, 20)):
        for row in range(begin, begin + count):
            file = tmp_path / "folder" / part / str(row % 2) / f"{row:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(row % 2 * 120 + row))
    found, expected = loaded(tmp_path / "wds"), load_data(DataSource(str(tmp_path / "folder")), FORM)
    assert (found.classes, found.preprocessing) == (expected.classes, expected.preprocessing)
    assert labels_of(found.train).tolist() == [0, 1] * 5
    for ours, theirs in ((found.train, expected.train), (found.test, expected.test)):
        by_class = sorted(range(len(ours)), key=lambda row: row % 2)  # type: ignore[arg-type]
        assert len(by_class) == len(theirs)  # type: ignore[arg-type]
        for place, row in enumerate(by_class):
            assert torch.equal(ours[row][0], theirs[place][0])
            assert ours[row][1] == theirs[place][1]


def test_shards_of_one_part_are_divided_and_classes_have_names(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", samples(20, classes=("dark", "1")))
    (tmp_path / "classes.txt").write_text("dark\nlight\n\nneither\n")
    found = loaded(tmp_path)
    assert found.classes == ("dark", "light", "neither")
    assert labels_of(found.test).tolist() == [0, 1, 0, 1]
    assert len(found.train) == 16  # type: ignore[arg-type]


def test_shards_labels_and_names_can_be_chosen(tmp_path: Path) -> None:
    files = [(name.replace(".cls", ".Class.txt"), content) for name, content in samples(10)]
    shard(tmp_path / "x-1.tar", [("notes/readme.txt", b"no sample"), *files])
    shard(tmp_path / "y-1.tar", files)
    shard(tmp_path / "z-1.tar", files[:4])
    (tmp_path / "names").write_text("a\nb\n")
    options = {"train": "x-*.tar", "test": "z-*.tar", "label": "class.txt", "classes": "names"}
    found = loaded(tmp_path, options=options)
    assert (len(found.train), len(found.test), found.classes) == (10, 2, ("a", "b"))  # type: ignore[arg-type]


def test_broken_images_in_shards_are_named_and_left_out(tmp_path: Path) -> None:
    files = samples(10)
    files[4] = (files[4][0], files[4][1][:40])  # the third image
    shard(tmp_path / "train.tar", files)
    shard(tmp_path / "test.tar", [("0.png", b"none"), ("0.cls", b"0"), *samples(4, begin=20)])
    data, notices = loaded(tmp_path), list[str]()
    assert data.unreadable == {f"{tmp_path / 'test.tar'}/0.png": "cannot identify image file it"}
    assert torch.equal(data.train[2][0], data.train[4][0])
    done = train(net(2), data, Recipe(epochs=1, batch_size=4), watcher=Watcher(on_notice=notices.append))
    assert list(done.unreadable) == [f"{tmp_path / 'train.tar'}/0002.png"]
    assert "1 training image can't be read" in notices[0]
    with pytest.raises(InvalidInput, match="2 images can't be read"):
        loaded(tmp_path, strict=True)


REFUSED: dict[str, tuple[Files, dict[str, Any], str]] = {
    "no image": ([("a.cls", b"0")], {}, r"a\.tar' holds no images; their names end in jpg"),
    "no class": (samples(10)[:-1], {}, r"no class for '0009\.png': beside it, a file that ends in \.cls must hold it"),
    "no number": (
        samples(10, classes=("0", "cat")),
        {},
        r"0001\.png' is 'cat'; it must be a number below 65536, or classes",
    ),
    "too many": (samples(10, classes=("0", "99999999999")), {}, "is '99999999999'; it must be a number below 65536"),
    "twice": ([*samples(10), ("0001.jpg", png(1))], {}, "two images '0001': each needs a name of its own"),
    "one class": (samples(10, classes=("0", "0")), {}, "has one class alone, '0'"),
    "no shard": (samples(10), {"train": "b*.tar"}, r"holds no shard 'b\*\.tar'"),
    "no test shard": (samples(10), {"test": "b*.tar"}, r"holds no shard 'b\*\.tar'"),
    "too few": (samples(4), {}, "has 4 images to train on and 0 to test on"),
    "no option": (samples(10), {"streamed": True}, r"data\.options.*streamed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_shards_that_can_not_be_used_are_refused(case: str, tmp_path: Path) -> None:
    files, options, said = REFUSED[case]
    shard(tmp_path / "a.tar", files)
    with pytest.raises(InvalidInput, match=said):
        loaded(tmp_path, options=options)


def test_classes_that_can_not_be_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", samples(10, classes=("0", "2")))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(InvalidInput, match=r"is '2'; it must be one of the 2 names, or a number below 2"):
        loaded(tmp_path)
    (tmp_path / "classes.txt").write_text("a\na\n")
    with pytest.raises(
        InvalidInput, match=r"classes\.txt' must name each class in a line of its own, and no class twice"
    ):
        loaded(tmp_path)
    with pytest.raises(FileNotFoundError):
        loaded(tmp_path, options={"classes": "others.txt"})


@pytest.mark.parametrize("name", ["https://example.org/train.tar", "pipe:cat train.tar", "nowhere"])
def test_shards_that_are_streamed_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="is no folder: shards are read from a folder of this machine"):
        load_data(DataSource(f"wds:{name}"), FORM)


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", samples(10), "w:gz")
    with pytest.raises(InvalidInput, match=r"a\.tar' is no tar file without compression"):
        loaded(tmp_path)


@pytest.mark.slow
def test_a_run_on_shards_is_made_longer_elsewhere_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended_well(*arguments: object) -> None:
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        assert not stopped.value.code, capsys.readouterr().err

    shard(tmp_path / "shards" / "train.tar", samples(40))
    shard(tmp_path / "shards" / "test.tar", samples(20, begin=40))
    (tmp_path / "shards" / "classes.txt").write_text("dark\nlight\n")
    monkeypatch.chdir(tmp_path)
    how = ("--data", "wds:shards", "--image-size", 8, "--batch-size", 8, "--learning-rate", 0.02)
    ended_well("train", "--model", TINY, *how, "--epochs", 2, "--out", "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ended_well("train", "--resume", "--out", tmp_path / "run", "--epochs", 3, "--trust")
    again = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (len(again["losses"]), again["test_images"]) == (3, 20)
    capsys.readouterr()
    measure = ("evaluate", tmp_path / "run" / "model.onnx", "--data", f"wds:{tmp_path / 'shards'}", "--json")
    ended_well(*measure, "--data-option", "test=test*.tar")
    found = json.loads(capsys.readouterr().out)
    assert (found["classes"], found["accuracy"]) == (["dark", "light"], again["accuracy"]["onnxruntime"])

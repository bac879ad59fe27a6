"""Data sets for Hugging Face's `datasets`: trained on, measured and refused like folders of images."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repfx.cli import main
from repfx.data.dataset import DataSet, DataSource, InputForm, labels_of
from repfx.data.load import load_data
from repfx.errors import InvalidInput
from repfx.training.loop import Watcher, train
from repfx.training.recipe import Recipe
from tests.tiny import net

datasets: Any = pytest.importorskip("datasets")
pytestmark = pytest.mark.tools

CLASSES = ["dark", "light"]
FORM = InputForm(1, size=8)
TINY = f"{Path(__file__).parents[1] / 'tiny.py'}:net"


def picture(number: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A grey image, the odd ones light, each of them another."""
    values = np.random.default_rng(number).integers(0, 100, (size[1], size[0]), dtype=np.uint8) + 100 * (number % 2)
    stream = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(stream, "png")
    return stream.getvalue()


def table(count: int, begin: int = 0, broken: tuple[int, ...] = (), **others: Any) -> Any:
    """Rows of an image and its label. `others` are further columns by name, each a feature and its values."""
    images = [picture(begin + row)[: 40 if row in broken else None] for row in range(count)]
    columns = {"image": [{"bytes": each, "path": None} for each in images], "label": [row % 2 for row in range(count)]}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    for name, (kind, values) in others.items():
        columns[name], kinds[name] = values, kind
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def saved(folder: Path, **parts: Any) -> str:
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return f"hf:{folder}"


def loaded(name: str, **how: Any) -> DataSet:
    return load_data(DataSource(name, **how), FORM)


def test_rows_are_images_like_those_of_a_folder(tmp_path: Path) -> None:
    name = saved(tmp_path / "saved", train=table(12), test=table(6, begin=20))
    for part, count, begin in (("train", 12, 0), ("test", 6, 20)):
        for row in range(count):
            file = tmp_path / "folder" / part / CLASSES[row % 2] / f"{row:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(begin + row))
    found, expected = loaded(name), loaded(str(tmp_path / "folder"))
    assert found.classes == expected.classes == ("dark", "light")
    assert found.preprocessing == expected.preprocessing
    assert labels_of(found.train).tolist() == [0, 1] * 6
    for ours, theirs in ((found.train, expected.train), (found.test, expected.test)):
        by_class = sorted(range(len(ours)), key=lambda row: row % 2)  # type: ignore[arg-type]
        for place, row in enumerate(by_class):
            assert torch.equal(ours[row][0], theirs[place][0])
            assert ours[row][1] == theirs[place][1]


def test_a_single_part_is_divided_as_a_folder_is(tmp_path: Path) -> None:
    table(20).save_to_disk(str(tmp_path / "one"))
    found = loaded(f"hf:{tmp_path / 'one'}")
    assert (len(found.train), len(found.test)) == (16, 4)  # type: ignore[arg-type]
    assert labels_of(found.test).tolist() == [0, 1, 0, 1]
    assert torch.equal(found.test[0][0], loaded(saved(tmp_path / "two", train=table(20))).test[0][0])


def test_images_without_labels_are_no_test_part_unless_another_has_some(tmp_path: Path) -> None:
    unlabelled = table(4).map(lambda row: {"label": -1})
    parts = {"train": table(10), "test": unlabelled}
    assert len(loaded(saved(tmp_path / "a", validation=table(6), **parts)).test) == 6  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="the images of test have no labels: set the option test"):
        loaded(saved(tmp_path / "b", **parts))
    with pytest.raises(InvalidInput, match="4 of 4 images of 'test' have no label: name another part"):
        loaded(f"hf:{tmp_path / 'b'}", options={"test": "test"})


def test_columns_and_parts_can_be_named(tmp_path: Path) -> None:
    coarse = (datasets.ClassLabel(names=["a", "b", "c"]), [2] * 10)
    name = saved(tmp_path / "d", learn=table(10, coarse=coarse), ask=table(10, coarse=coarse))
    options = {"label": "coarse", "train": "learn", "test": "ask"}
    found = loaded(name, options=options)
    assert found.classes == ("a", "b", "c")
    assert labels_of(found.test).tolist() == [2] * 10
    with pytest.raises(
        InvalidInput, match=r"2 columns of ClassLabel; .*coarse \(ClassLabel\): name one by the option label"
    ):
        loaded(name, options={**options, "label": ""})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such part": ({"train": "learn"}, r"no part 'learn'; it has train, test: set the option train"),
    "no such test": ({"test": "ask"}, r"no part 'ask'; it has train, test"),
    "no such column": ({"image": "photo"}, r"the column 'photo' doesn't exist; its columns are image \(Image\)"),
    "another kind": ({"label": "words"}, r"the column 'words' is Value, and not ClassLabel"),
    "no such option": ({"colour": "x"}, r"data\.options.*colour"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    options, said = REFUSED[case]
    words = (datasets.Value("string"), ["word"] * 10)
    name = saved(tmp_path / "d", train=table(10, words=words), test=table(10, words=words))
    with pytest.raises(InvalidInput, match=said):
        loaded(name, options=options)


def test_data_of_other_features_is_refused(tmp_path: Path) -> None:
    texts = datasets.Dataset.from_dict({"text": ["a", "b"]})
    with pytest.raises(
        InvalidInput, match=r"0 columns of Image; its columns are text \(Value\): cast one to datasets.Image"
    ):
        loaded(saved(tmp_path / "a", train=texts))
    numbers = table(10).cast_column("label", datasets.Value("int64"))
    with pytest.raises(
        InvalidInput, match=r"0 columns of ClassLabel; .*label \(Value\): cast one to datasets.ClassLabel"
    ):
        loaded(saved(tmp_path / "b", train=numbers))
    renamed = table(10).cast_column("label", datasets.ClassLabel(names=["light", "dark"]))
    with pytest.raises(InvalidInput, match="has other classes in 'test' than in 'train'"):
        loaded(saved(tmp_path / "c", train=table(10), test=renamed))
    alone = table(10).cast_column("label", datasets.ClassLabel(names=["dark", "light"])).remove_columns("label")
    alone = alone.add_column("label", [0] * 10).cast_column("label", datasets.ClassLabel(names=["dark"]))
    with pytest.raises(InvalidInput, match="has 1 classes: a classifier needs at least two"):
        loaded(saved(tmp_path / "d", train=alone))


def test_nothing_is_downloaded_unless_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        InvalidInput, match=r"'nobody/nothing' can't be loaded by datasets .*--download lets it be fetched"
    ):
        loaded("hf:nobody/nothing")
    assert datasets.config.HF_HUB_OFFLINE is False
    with pytest.raises(InvalidInput, match=f"'{tmp_path}' can't be loaded by datasets"):
        loaded(f"hf:{tmp_path}")


def test_broken_images_are_named_and_left_out(tmp_path: Path) -> None:
    name = saved(tmp_path / "d", train=table(10, broken=(2,)), test=table(6, broken=(3, 4)))
    data, notices = loaded(name), list[str]()
    assert set(data.unreadable) == {"test[3]", "test[4]"}
    assert all("BytesIO" not in reason for reason in data.unreadable.values())
    assert labels_of(data.test).tolist() == [0, 1, 0, 1]
    assert torch.equal(data.train[2][0], data.train[4][0])
    done = train(net(2), data, Recipe(epochs=1, batch_size=4, workers=1), watcher=Watcher(on_notice=notices.append))
    assert set(done.unreadable) == {"train[2]"}
    assert notices[0].startswith("1 training image can't be read and is left out: 'train[2]' (")
    with pytest.raises(InvalidInput, match=r"3 images can't be read: 'test\[3\]'"):
        loaded(name, strict=True)


def test_parquet_files_in_a_folder_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    for part, count in (("train", 10), ("test", 4)):
        table(count).to_parquet(str(tmp_path / "files" / f"{part}.parquet"))
    found = loaded(f"hf:{tmp_path / 'files'}")
    assert (len(found.train), len(found.test), found.classes) == (10, 4, ("dark", "light"))  # type: ignore[arg-type]


def test_images_of_one_size_keep_it_and_others_get_the_usual_one(tmp_path: Path) -> None:
    name = saved(tmp_path / "a", train=table(10))
    assert load_data(DataSource(name), InputForm(3)).example_shape == (3, 8, 8)
    column = [{"bytes": picture(row, (8, 8 + row)), "path": None} for row in range(10)]
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES))
    mixed = datasets.Dataset.from_dict({"image": column, "label": [0, 1] * 5}, features=kinds)
    assert load_data(DataSource(saved(tmp_path / "b", train=mixed)), InputForm(3)).example_shape == (3, 224, 224)


def ended_well(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    assert not stopped.value.code


def test_a_run_is_trained_made_longer_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    coarse = (datasets.ClassLabel(names=["a", "b"]), [0, 1] * 20)
    saved(tmp_path / "d", train=table(40, coarse=coarse), test=table(40, begin=50, coarse=coarse))
    monkeypatch.chdir(tmp_path)
    begin = ("train", "--model", TINY, "--data", "hf:d", "--data-option", "label=label", "--out", "run")
    ended_well(*begin, "--batch-size", 8, "--learning-rate", 0.02, "--epochs", 2)
    capsys.readouterr()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ended_well("train", "--resume", "--out", tmp_path / "run", "--epochs", 3, "--trust")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (len(metrics["losses"]), metrics["test_images"]) == (3, 40)
    capsys.readouterr()
    measure = ("evaluate", tmp_path / "run" / "model.onnx", "--data", f"hf:{tmp_path / 'd'}", "--json")
    ended_well(*measure, "--data-option", "label=label")
    found = json.loads(capsys.readouterr().out)
    assert (found["classes"], found["accuracy"]) == (CLASSES, metrics["accuracy"]["onnxruntime"])

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from repfx.data.class_names import RelabelledImages, matched, require_same
from repfx.data.dataset import DataSet, DataSource, labels_of
from repfx.data.predictions import predict
from repfx.data.samples import samples
from repfx.errors import InvalidInput
from repfx.training.experiment import Experiment, run
from repfx.training.loop import Watcher
from repfx.training.models import ModelReference
from repfx.training.recipe import Recipe
from repfx.training.run_folder import RunFolder
from repfx.training.runs.history import History

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
RUN = ("blue", "green", "red")


def write_colours(path: Path, *names: str, of: dict[str, str] | None = None) -> DataSource:
    """Write 10 images of each class; `of` gives the colour of a class whose name is none."""
    for name in names:
        (path / name).mkdir(parents=True)
        for place in range(10):
            Image.new("RGB", (9, 7), COLOURS[(of or {}).get(name, name)]).save(path / name / f"{place}.png")
    return DataSource(str(path))


class ColourNet(nn.Module):
    """Tells the three colours apart: blue, green, red."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.conv.weight.data = torch.eye(3).flip(0).reshape(3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.conv(x).mean((2, 3))
        return scores


def accuracy(source: DataSource, **options: Any) -> float:
    real = samples(ColourNet(), source, 4, shape=(3, 8, 8), **options)
    return predict(ColourNet(), real.labelled.dataset, 4).accuracy


@pytest.mark.parametrize("names", [RUN, ("green", "red"), ("blue", "red"), ("red", "blue")])
def test_a_folder_that_lacks_classes_is_matched_by_name(names: tuple[str, ...], tmp_path: Path) -> None:
    source = write_colours(tmp_path, *names)
    assert accuracy(source, classes=RUN) == 1
    if "blue" not in names or "green" not in names:
        assert accuracy(source) < 1  # what the labels would count otherwise


def test_a_folder_with_another_class_is_refused(tmp_path: Path) -> None:
    source = write_colours(tmp_path, "azure", "bleu", *RUN, of={"azure": "blue", "bleu": "blue"})
    with pytest.raises(
        InvalidInput,
        match=r"has classes of unknown names: azure, bleu \(blue\?\)\. The model was trained on 3 classes: blue, green, red",
    ):
        samples(ColourNet(), source, 4, shape=(3, 8, 8), classes=RUN)


def test_labels_in_another_order_are_matched() -> None:
    data = DataSet([(0.0, 1), (0.5, 0)], [(0.25, 2), (0.75, 1)], ("c", "a", "b"))  # type: ignore[arg-type]
    found = matched(data, ("a", "b", "c"), "here")
    assert [found.train[place] for place in range(2)] == [(0.0, 0), (0.5, 2)]
    assert [found.test[place] for place in range(2)] == [(0.25, 1), (0.75, 0)]
    assert labels_of(found.train).tolist() == [0, 2]
    assert isinstance(found.train, RelabelledImages)
    assert found.classes == ("a", "b", "c")


def test_names_that_two_classes_share_are_refused() -> None:
    data = DataSet([], [], ("a", "a", "b"))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="has classes that share a name: a"):
        matched(data, ("a", "b", "c"), "here")


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (("blue", "red"), "now lacks green"),
        (("blue", "cyan", "red"), "now lacks green and has also cyan"),
        (("blue", "cyan", "green", "red"), "now has also cyan"),
        (("red", "green", "blue"), "now has them in another order"),
    ],
)
def test_a_run_goes_on_with_the_same_classes_only(now: tuple[str, ...], said: str) -> None:
    data = DataSet([], [], now)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=rf"the run in 'there' was begun with 3 classes, and 'here' {said}"):
        require_same(data, RUN, "here", "there")


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_a_resumed_run_asks_for_the_classes_it_was_begun_with(tmp_path: Path) -> None:
    def stop(history: History) -> None:
        if len(history.epochs) == 3:
            raise Stopped

    experiment = Experiment(
        ModelReference("torchvision:squeezenet1_1"),
        write_colours(tmp_path / "data", *RUN),
        training=Recipe(epochs=2, batch_size=6),
        spec=[],
        image_size=24,
        out=tmp_path / "run",
    )
    with pytest.raises(Stopped):
        run(experiment, Watcher(on_epoch=stop))
    assert RunFolder(experiment.out).setup.classes == RUN
    (tmp_path / "data" / "blue").rename(tmp_path / "blue")
    with pytest.raises(InvalidInput, match=r"was begun with 3 classes, and '.*data' now lacks blue"):
        run(replace(experiment, resume=True))
    (tmp_path / "blue").rename(tmp_path / "data" / "blue")
    assert run(replace(experiment, resume=True)) is not None

"""Things that several commands take and tell: shapes, options, models, and the changes of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from repfx.commands.arguments import example_input, load_model, parse_options, shape_of_input
from repfx.commands.progress import _Teller
from repfx.errors import InvalidInput
from repfx.onnx.preprocessing import Preprocessing
from repfx.passes.freeze import Freeze
from repfx.training.models import ModelReference
from repfx.training.run_folder import Setup
from repfx.training.runs.history import Epoch, History


@pytest.mark.parametrize(
    ("asked", "shape"), [("3x20x30", (3, 20, 30)), ("1,7,5", (1, 7, 5)), (" 2 x 9", (2, 9)), (None, (4, 5, 6))]
)
def test_a_shape_keeps_its_order(asked: str | None, shape: tuple[int, ...]) -> None:
    setup = Setup(
        ModelReference("torchvision:resnet18"), "dbb", None, Preprocessing((4, 5, 6), (0.5,) * 4, (0.25,) * 4)
    )
    assert shape_of_input(asked, setup) == shape


@pytest.mark.parametrize("asked", ["3x0x4", "3x-1", "axb", "", "3xx4"])
def test_a_shape_of_other_things_is_refused(asked: str) -> None:
    with pytest.raises(InvalidInput, match="must be whole numbers from 1 with x between them"):
        shape_of_input(asked, None)


def test_an_example_has_the_shape_of_the_model() -> None:
    net = nn.Sequential(nn.Conv2d(5, 4, 3))
    assert example_input(net, None).shape == (2, 5, 224, 224)
    assert example_input(net, (5, 8, 9)).shape == (2, 5, 8, 9)
    assert torch.equal(example_input(net, (5, 8, 9)), example_input(net, (5, 8, 9)))
    assert example_input(nn.Sequential(nn.Conv3d(1, 2, 3)), None).shape == (2, 1, 16, 112, 112)


def test_values_of_options_are_json_or_text() -> None:
    given = ["width=16", "name=large", "deep=true", "sizes=[1, 2]", "text=a=b", 'quoted="3"']
    expected = {"width": 16, "name": "large", "deep": True, "sizes": [1, 2], "text": "a=b", "quoted": "3"}
    assert parse_options(given) == expected


@pytest.mark.parametrize("text", ["width", "=3"])
def test_an_option_without_a_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="must be NAME=VALUE"):
        parse_options([text])


@pytest.mark.parametrize(
    "given",
    [{"weights": Path("w.pt")}, {"num_classes": 3}, {"option": ["width=16"]}],
    ids=["weights", "classes", "option"],
)
def test_a_run_has_weights_and_options_of_its_own(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "structure.json").write_text(json.dumps({}))
    known: dict[str, Any] = {"weights": None, "num_classes": None, "option": None, **given}
    with pytest.raises(InvalidInput, match="is a training run, which has its own weights and options"):
        load_model(str(tmp_path), **known, trust=False)


def test_a_resumed_run_tells_each_change_once() -> None:
    said: list[object] = []
    tell = _Teller(said.append)
    epochs = [Epoch(number, actions=(Freeze(f"conv{number}"),)) for number in range(4)]
    tell(History(tuple(epochs[:2])))  # it was resumed, so these were told before
    assert said == []
    for length in (3, 4):
        tell(History(tuple(epochs[:length])))
    assert said == ["after epoch 2: freeze conv2", "after epoch 3: freeze conv3"]


def test_a_new_run_tells_its_beginning() -> None:
    said: list[object] = []
    _Teller(said.append)(History((Epoch(0, actions=(Freeze("conv"),)),)))
    assert said == ["at the beginning: freeze conv"]

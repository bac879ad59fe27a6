"""Models by name, and weights from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from repfx.errors import InvalidInput
from repfx.training.models import ModelReference, load_weights, read_weights
from tests.tiny import net

TINY = str(Path(__file__).parents[1] / "tiny.py")


def test_a_callable_in_a_file_gets_classes_and_options() -> None:
    model = ModelReference(f"{TINY}:net", 3, {"width": 4}).build()
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


def test_a_callable_in_a_package_is_called() -> None:
    assert isinstance(ModelReference("tests.tiny:net").build(), nn.Sequential)


def test_a_callable_that_takes_no_classes_is_called_without() -> None:
    assert ModelReference(f"{TINY}:fixed", 10).build()[-1].out_features == 2  # type: ignore[index]


def test_timm_models_have_the_classes_asked_for() -> None:
    assert ModelReference("timm:repvgg_a0", 7).build()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "has the wrong form"),
        ("torchvision:resnet19", "did you mean 'resnet18'"),
        ("timm:resnet19", "timm has no model 'resnet19'; did you mean"),
        ("no/such/file.py:net", "no file 'no/such/file.py'"),
        ("no_such_package:net", "importing 'no_such_package' failed"),
        (f"{TINY}:nett", "did you mean 'net'"),
        (f"{TINY}:no_model", "gave str, not a torch.nn.Module"),
        (f"{TINY}:broken", "this net is broken"),
        ("torchvision:raft_small", "can't be built: TypeError"),
    ],
)
def test_what_can_not_be_built_is_named(name: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message.replace("(", r"\(")):
        ModelReference(name, 2).build()


def save_plain(weights: dict[str, Any], path: Path) -> Path:
    torch.save(weights, path / "w.pt")
    return path / "w.pt"


def save_wrapped(weights: dict[str, Any], path: Path) -> Path:
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}, "epoch": 3}, path / "w.pth")
    return path / "w.pth"


def save_safe(weights: dict[str, Any], path: Path) -> Path:
    save_file(weights, path / "w.safetensors")
    return path / "w.safetensors"


@pytest.mark.parametrize("save", [save_plain, save_wrapped, save_safe])
def test_weights_come_back_from_every_format(save: Callable[[dict[str, Any], Path], Path], tmp_path: Path) -> None:
    source, target = net(), net()
    load_weights(target, save(source.state_dict(), tmp_path))
    loaded = target.state_dict()
    assert loaded.keys() == source.state_dict().keys()
    assert all(torch.equal(value, loaded[key]) for key, value in source.state_dict().items())


@pytest.mark.parametrize(("other", "message"), [(net(3), r"'8.weight' is \(3, 64\)"), (nn.Linear(2, 2), "unexpected")])
def test_weights_of_another_model_change_nothing(other: nn.Module, message: str, tmp_path: Path) -> None:
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InvalidInput, match=message):
        load_weights(model, save_plain(other.state_dict(), tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_pickled_object_is_not_unpickled(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "model.pt")
    with pytest.raises(InvalidInput, match="can't be read as weights"):
        read_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(InvalidInput, match=name):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_missing_file_is_an_error_of_the_system(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / name)


def test_a_number_is_no_weights(tmp_path: Path) -> None:
    torch.save(3, tmp_path / "w.pt")
    with pytest.raises(InvalidInput, match="holds no weights"):
        read_weights(tmp_path / "w.pt")

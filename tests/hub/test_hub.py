"""Runs pushed to and loaded from a stub of the Hub, by huggingface_hub itself."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import repfx.hub
from repfx.errors import InvalidInput
from repfx.hub.model_card import model_card
from repfx.hub.repository import _without_folders
from repfx.testing import relative_error
from repfx.training.experiment import Experiment, run
from repfx.training.models import ModelReference
from repfx.training.recipe import Recipe
from repfx.training.run_folder import RunFolder
from tests.hub.stub_hub import COMMIT, TOKEN, StubHub, running
from tests.recorded_run import TINY

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits, with branches."""
    out = tmp_path_factory.mktemp("runs") / "first"
    run(Experiment(ModelReference(TINY), spec="repvgg", training=Recipe(epochs=1), image_size=8, out=out))
    return out


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with running() as found:
        yield found


def test_what_is_pushed_is_loaded_again(finished: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(TINY.rpartition(":")[0]).parent)  # where the net's file is
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    address = repfx.hub.push(finished, "me/tiny", token=TOKEN, endpoint=hub.url, license="mit", private=True)
    assert address == f"{hub.url}/me/tiny/commit/{COMMIT}"
    assert "me/tiny" in hub.private
    assert hub.messages == ["A run of repfx"]
    loaded = repfx.hub.load("me/tiny", endpoint=hub.url, trust=True)
    x = torch.randn(3, 1, 8, 8)
    own = RunFolder(finished).load(trust=True)
    assert not loaded.training
    assert relative_error(loaded(x), own(x)) == 0
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    session = onnxruntime.InferenceSession(hub.repositories["me/tiny"]["model.onnx"])
    assert relative_error(torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), own(x)) < 1e-5


def test_no_file_names_a_folder_of_the_machine(finished: Path, hub: StubHub) -> None:
    repfx.hub.push(finished, "me/tiny", token=TOKEN, endpoint=hub.url)
    files = hub.repositories["me/tiny"]
    assert set(files) >= {
        "README.md",
        "model.onnx",
        "checkpoint.safetensors",
        "structure.json",
        "recipe.toml",
        "metrics.json",
    }
    for name, content in files.items():
        for folder in (str(finished), str(Path(__file__).parents[2]), str(Path.home()) + "/"):
            assert folder.encode() not in content, name
    assert json.loads(files["structure.json"])["model"]["name"] == "tiny.py:net"


def test_a_card_says_what_was_measured_and_what_was_not(finished: Path) -> None:
    card = model_card(RunFolder(finished), repository="me/tiny", license="mit")
    metrics: Any = RunFolder(finished).metrics
    head = card.split("---")[1]
    entries = dict(line.split(": ", 1) for line in head.strip().splitlines())
    assert {key: json.loads(value) for key, value in entries.items()}["license"] == "mit"
    (result,) = json.loads(entries["model-index"])[0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(metrics["accuracy"]["onnxruntime"], abs=1e-6)
    fused = next(line for line in card.splitlines() if line.startswith("| fused |"))
    assert f"{metrics['accuracy']['fused']:.2%}".replace("%", " %") in fused
    assert re.search(r"± \d+\.\d\d \|", fused)
    assert f"Only the {metrics['test_images']} test images" in card
    assert "seed 0" in card
    assert "No license" not in card
    assert "trust=True" in card
    assert "`tiny.py:net`, which isn't in this repository" in card
    assert "No license was given" in model_card(RunFolder(finished), repository="me/tiny")


@pytest.mark.parametrize(
    ("name", "pushed", "told"),
    [
        ("/home/me/photographs", "photographs", "photographs"),
        ("hf:/home/me/photographs", "hf:photographs", "photographs"),
        ("wds:/home/me/shards", "wds:shards", "shards"),
        ("hf:uoft-cs/cifar100", "hf:uoft-cs/cifar100", "uoft-cs/cifar100"),
    ],
)
def test_data_is_named_without_its_folder_and_a_data_set_of_the_hub_in_full(
    name: str, pushed: str, told: str, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    recipe = (tmp_path / "run" / "recipe.toml").read_text()
    (tmp_path / "run" / "recipe.toml").write_text(recipe.replace('name = "digits"', f'name = "{name}"'))
    folder = RunFolder(tmp_path / "run")
    assert f"trained on {told}." in model_card(folder, repository="me/tiny")
    assert f'name = "{pushed}"' in _without_folders(folder)["recipe.toml"]


def test_what_can_not_be_pushed_is_refused(finished: Path, hub: StubHub, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"holds no training run"):
        repfx.hub.push(tmp_path, "me/tiny", token=TOKEN, endpoint=hub.url)
    with pytest.raises(InvalidInput, match=r"the Hub doesn't take 'me/tiny': .*401"):
        repfx.hub.push(finished, "me/tiny", token="hf_wrong", endpoint=hub.url)
    with pytest.raises(InvalidInput, match=r"the Hub doesn't take 'no/such/name'"):
        repfx.hub.push(finished, "no/such/name", token=TOKEN, endpoint=hub.url)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "structure.json").write_bytes((finished / "structure.json").read_bytes())
    with pytest.raises(InvalidInput, match=r"isn't finished: `repfx train --resume"):
        repfx.hub.push(unfinished, "me/tiny", token=TOKEN, endpoint=hub.url)
    assert not any(hub.repositories.values())


def test_what_can_not_be_loaded_is_refused(finished: Path, hub: StubHub, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"'me/none' can't be loaded from the Hub: .*404"):
        repfx.hub.load("me/none", endpoint=hub.url)
    hub.repositories["me/other"] = {"README.md": b"# Other"}
    with pytest.raises(InvalidInput, match=r"'me/other' holds no run of repfx: it has no checkpoint.safetensors"):
        repfx.hub.load("me/other", endpoint=hub.url)
    repfx.hub.push(finished, "me/tiny", token=TOKEN, endpoint=hub.url)
    with pytest.raises(InvalidInput, match="trust"):
        repfx.hub.load("me/tiny", endpoint=hub.url)


def test_a_folder_is_loaded_without_the_hub(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    x = torch.randn(2, 1, 8, 8)
    assert relative_error(repfx.hub.load(finished, trust=True)(x), RunFolder(finished).load(trust=True)(x)) == 0
    with pytest.raises(InvalidInput, match=r"pip install 'repfx\[hub\]'"):
        repfx.hub.load("me/tiny")

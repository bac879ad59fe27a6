"""A training begins from fresh weights, from a file of weights, or from the training form of an earlier run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import repfx
from repfx.cli import main
from repfx.errors import InvalidInput
from repfx.testing import assert_same_map, randomize_batch_norm
from repfx.training.run_folder import CHECKPOINT, STRUCTURE, RunFolder, begin_from
from tests.tiny import net

TINY = f"{Path(__file__).parents[1] / 'tiny.py'}:net"
X = torch.randn(3, 1, 8, 9, dtype=torch.float64)


def grown() -> nn.Module:
    model = repfx.expand(net().double(), "dbb")
    return randomize_batch_norm(model).eval()


def run_folder(folder: Path, model: nn.Module) -> Path:
    (folder / STRUCTURE).write_text("{}")  # it isn't read
    RunFolder(folder).write_checkpoint(model)
    return folder


@pytest.mark.parametrize("kind", ["run", "checkpoint"])
def test_a_run_gives_its_training_form(kind: str, tmp_path: Path) -> None:
    earlier = grown()
    path = run_folder(tmp_path, earlier) / ("" if kind == "run" else CHECKPOINT)
    plain = net().double()
    begun = begin_from(plain, path)
    assert begun is plain
    assert repfx.journal(begun) == repfx.journal(earlier)
    assert_same_map(begun.eval(), earlier, X)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_gives_weights(name: str, tmp_path: Path) -> None:
    source = randomize_batch_norm(net()).eval()
    if name.endswith(".pt"):
        torch.save(source.state_dict(), tmp_path / name)
    else:
        repfx.save(tmp_path / name, source)
    assert_same_map(begin_from(net(), tmp_path / name).eval(), source, X.float(), 0)


def test_what_is_no_beginning_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    plain = net()
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(InvalidInput, match="holds no training run: it has no"):
        begin_from(plain, tmp_path)
    (tmp_path / STRUCTURE).write_text("{}")
    with pytest.raises(InvalidInput, match="isn't finished"):
        begin_from(plain, tmp_path)
    with pytest.raises(InvalidInput, match="doesn't fit"):
        begin_from(plain, run_folder(tmp_path, repfx.expand(net(width=4), "dbb")))
    with pytest.raises(FileNotFoundError):
        begin_from(plain, tmp_path / "none.safetensors")
    assert plain.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def train(out: Path, *options: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--model", TINY, "--image-size", "8", "--seed", "3", "--out", str(out), "--json", *options])
    assert not stopped.value.code


@pytest.mark.slow
def test_repan_begins_with_a_pretrained_net_of_blocks(tmp_path: Path) -> None:
    train(tmp_path / "first", "--spec", "acb", "--epochs", "1")
    options = ("--schedule", "repan", "--schedule-option", "cycles=1", "--spec", "repvgg")
    train(tmp_path / "second", "--weights", str(tmp_path / "first"), *options, "--epochs", "1")
    kinds = [action.kind for action in repfx.journal(RunFolder(tmp_path / "second").load(trust=True))]
    assert kinds == ["expand"] * 2 + ["fuse"] * 2 + ["restore"] * 2 + ["expand"] * 2

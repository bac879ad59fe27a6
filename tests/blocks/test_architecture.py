"""Architectures as files: what they keep, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import repfx
from repfx.blocks.architecture import Architecture
from repfx.blocks.block import RepBlock
from repfx.errors import InvalidInput, UnknownName
from repfx.passes.gate import gate
from tests.small_net import small_net


def found(**more: Any) -> dict[str, Any]:
    site = {
        "conv": "3×3 3→8",
        "branches": [{"kind": "1x1", "options": {}}],
        "code": "11",
        "norm": "batch_norm",
        "weights": "default",
    }
    others = {"plain": "3×3 8→8", "depthwise": "7×7 8→8 depthwise"}
    return {"format": 1, "sites": {"stem": {**site, **more}}, "others": others}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "no architecture that a search wrote"),
        ("{}", "no architecture that a search wrote"),
        (json.dumps({"format": 9, "sites": {}}), "it has format 9"),
        (json.dumps(found(code="1")), "isn't one digit 0 or 1 for each of 2 paths"),
        (json.dumps(found(code="12")), "isn't one digit 0 or 1"),
        (json.dumps(found(code="00")), "a site's code has no 1, so the site would have no path"),
        (
            json.dumps(found(conv="5×5 3→8")),
            "of another net: it has a conv 5×5 3→8 at 'stem', this one has a conv 3×3 3→8",
        ),
        (json.dumps({**found(), "sites": {"stam": found()["sites"]["stem"]}}), "at 'stam', this one has none"),
        (json.dumps({**found(), "others": {}}), "it has none at 'plain', this one has a conv 3×3 8→8"),
        (json.dumps({**found(), "sites": {}}), "it has no sites"),
        (json.dumps(found(importance=[0.1])), "found 1 importances for 2 paths; there must be one for each, or none"),
        (json.dumps(found(importance=["a", "b"])), "importances must be numbers"),
        (json.dumps(found(branches=[{"kind": "identity"}])), "doesn't fit 'stem': not identity: 3 channels go in"),
        (json.dumps(found(branches=[{"kind": "2x9", "options": {}}])), "no branch kind '2x9'"),
    ],
)
def test_files_that_are_no_architecture_of_this_net(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "architecture.json"
    path.write_text(content)
    model = small_net()
    with pytest.raises((InvalidInput, UnknownName), match=message):
        repfx.expand(model, str(path))
    assert not any(isinstance(module, RepBlock) for module in model.modules())


def test_an_own_conv_that_rests_can_t_be_preserved(tmp_path: Path) -> None:
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps(found(code="01")))
    with pytest.raises(InvalidInput, match="the function can't be kept: give preserve=False"):
        repfx.expand(small_net(), str(path), preserve=True)
    model: Any = repfx.expand(small_net(), str(path))
    assert model.stem.running == ("1x1",)
    assert model.stem.rests


def test_the_names_of_branches_of_one_kind_are_kept(tmp_path: Path) -> None:
    model = repfx.expand(small_net(), "mobileone", preserve=False)
    gate(model, "stem")
    stem: Any = model.stem
    stem.gates.choose(["kxk-2", "kxk-3", "1x1"])
    Architecture.of(model).save(tmp_path / "architecture.json")
    again = repfx.expand(small_net(), str(tmp_path / "architecture.json"))
    assert list(again.get_submodule("stem").branches) == ["kxk-2", "kxk-3", "1x1"]
    assert repfx.journal(again)[0].to_dict()["branches"][0]["name"] == "kxk-2"


def test_paths_with_brackets_are_no_patterns(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("a[1]", nn.Conv2d(3, 8, 3))
    Architecture.of(repfx.expand(model, ["1x1"])).save(tmp_path / "architecture.json")
    assert isinstance(repfx.expand(model, str(tmp_path / "architecture.json")).get_submodule("a[1]"), RepBlock)


def test_an_architecture_needs_blocks() -> None:
    with pytest.raises(InvalidInput, match="has no blocks"):
        Architecture.of(small_net())
    nested = repfx.expand(repfx.expand(small_net(), {"stem": "dbb"}), {"stem.1x1-kxk.conv2": "acb"})
    with pytest.raises(InvalidInput, match="a block inside a block"):
        Architecture.of(nested)


def test_codes_as_matrices() -> None:
    """Sites of one net may have other branches than their neighbours; a matrix has a column for each kind all the same."""
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)]
    model = repfx.expand(nn.Sequential(*layers), {"0": ["1x1", "1xk"], "1": ["identity", "1x1"], "2": ["kxk", "kxk"]})
    architecture = Architecture.of(repfx.drop(model, "1", "1x1"))
    assert architecture.kinds == ("1x1", "1xk", "identity", "kxk", "kxk-2")
    rows = ((1, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 1))
    assert architecture.matrices() == (rows,)
    assert architecture.matrices(2) == (rows[:2], rows[2:])
    with pytest.raises(InvalidInput, match="give at least 1"):
        architecture.matrices(0)


def test_where_the_batch_norm_stays_is_kept() -> None:
    spec = repfx.Spec(["1x1"], norm_behind=True)
    found = Architecture.of(repfx.expand(small_net(), {"stem": spec}))
    again: Any = repfx.expand(small_net(), Architecture.from_json(found.to_json()))
    assert again.stem.norm_behind == "norm"

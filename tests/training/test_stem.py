"""The frozen stem: what keeps its weights and statistics while the rest is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from repfx.blocks.architecture import Architecture
from repfx.blocks.block import RepBlock
from repfx.change.schedule import SCHEDULES
from repfx.errors import Interrupted, InvalidInput, UnknownName
from repfx.passes.expand import expand
from repfx.search.random_nets import random_nets
from repfx.testing import randomize_batch_norm
from repfx.training.experiment import Experiment, run
from repfx.training.loop import train
from repfx.training.models import ModelReference
from repfx.training.optimizers import make_optimizer
from repfx.training.recipe import QuantizationAware, Recipe
from repfx.training.run_folder import RECIPE, RunFolder
from repfx.training.stem import Stem
from tests.tiny import net
from tests.training.test_training import pictures, trained

CPU = torch.device("cpu")


def blocks(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, RepBlock)]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.first = nn.Conv2d(1, 4, 3)
        self.nothing = None
        self.register_module("none", None)
        self.features = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)))
        self.features_too = nn.Conv2d(4, 4, 1)


def test_a_stem_is_a_module_and_what_is_registered_before_it() -> None:
    stem = Stem.up_to(Nested(), "features.1.0")
    assert stem.paths == ("first", "features.0", "features.1.0")
    found = {path: stem.holds(path) for path in ("first", "features", "features.0", "features.1", "features_too")}
    assert found == {"first": True, "features": False, "features.0": True, "features.1": False, "features_too": False}
    assert Stem.up_to(Nested(), "features").holds("features.1.1")
    assert not Stem.up_to(Nested(), "").holds("first")


@pytest.mark.parametrize("path", ["feature", "features.2", "scale", "none"])
def test_a_stem_that_is_no_module_is_refused(path: str) -> None:
    with pytest.raises(UnknownName, match=rf"no module to freeze '{path}'"):
        Stem.up_to(Nested(), path)


def test_a_net_that_is_frozen_as_a_whole_is_refused() -> None:
    with pytest.raises(
        InvalidInput, match="freeze = '8' leaves nothing to train in Sequential: name an earlier module"
    ):
        train(net(2), pictures(), Recipe(epochs=1, batch_size=8, freeze="8"))


@pytest.mark.parametrize("average", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_the_stem_keeps_weights_and_statistics_and_the_rest_learns(average: float) -> None:
    model = net(2)
    randomize_batch_norm(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = Recipe(epochs=2, batch_size=8, learning_rate=0.1, weight_decay=0.5, average=average, freeze="1")
    after = train(model, pictures(), recipe).model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("0.", "1."))}
    optimizer = make_optimizer(model, recipe, CPU)
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert held == {id(each) for name, each in model.named_parameters() if not name.startswith(("0.", "1."))}


def test_the_modules_of_a_stem_stay_in_eval_mode_and_the_rest_is_as_it_is_set() -> None:
    model = net(2)
    stem = Stem.up_to(model, "1")
    stem.train(model)
    assert [module.training for module in model] == [False, False, *[True] * 7]
    stem.train(model, False)
    assert not any(module.training for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["dyrep", "repan"])
def test_schedules_leave_the_stem_alone(schedule: str) -> None:
    model = net(2)
    randomize_batch_norm(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = Recipe(epochs=6, batch_size=20, learning_rate=0.05, freeze="1")
    done = train(model, pictures(), recipe, SCHEDULES[schedule].over(6, spec="acb"))
    touched = {action.site for epoch in done.history.epochs for action in epoch.actions}
    assert "3" in touched
    assert "0" not in touched
    after = done.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith(("0.", "1.")))


@pytest.mark.parametrize("spec", ["acb", ["1x1"], {"0": "acb", "*": ["1x1"]}, {"*": "acb"}])
def test_the_sites_of_a_stem_get_no_branches(spec: Any) -> None:
    model = net(2)
    assert blocks(expand(model, Stem.up_to(model, "1").left_out(model, spec))) == ["3"]
    assert blocks(expand(model, Stem().left_out(model, spec))) == ["0", "3"]


def test_an_architecture_serves_the_sites_behind_the_stem(tmp_path: Path) -> None:
    model = net(2)
    (found,) = random_nets(model, 1.0, 1, spec="acb")
    assert isinstance(found, Architecture)
    found.save(tmp_path / "found.json")
    for spec in (found, str(tmp_path / "found.json")):
        assert blocks(expand(model, Stem.up_to(model, "1").left_out(model, spec))) == ["3"]


def test_linear_layers_of_a_stem_get_no_branches_either() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert blocks(expand(model, Stem.up_to(model, "0").left_out(model, "lora"))) == ["2"]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [None, "dyrep"])
def test_an_interrupted_training_with_a_stem_goes_on_to_the_same_bits(schedule: str | None, tmp_path: Path) -> None:
    recipe = Recipe(epochs=4, batch_size=8, learning_rate=0.01, freeze="1", average=0.9)
    state = tmp_path / "state.safetensors"
    with pytest.raises(Interrupted):
        trained(recipe, schedule, state, stop_at=12)
    weights, history = trained(recipe, schedule, state, resume=True)
    whole, whole_history = trained(recipe, schedule)
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    assert history == whole_history


@pytest.mark.slow
def test_a_run_with_a_stem_says_so_and_has_its_branches_behind_it(tmp_path: Path, quick_end: None) -> None:
    model = ModelReference(f"{Path(__file__).parents[1] / 'tiny.py'}:net")
    out = tmp_path / "out"
    run(Experiment(model, spec="acb", image_size=8, training=Recipe(epochs=1, freeze="1"), out=out))
    folder = RunFolder(out)
    assert 'freeze = "1"' in (out / RECIPE).read_text()
    assert blocks(folder.load(trust=True)) == ["3"]
    assert json.loads((out / "structure.json").read_text())["spec"] == "acb"
    with pytest.raises(InvalidInput, match=r"was begun with training\.freeze = '1', and now it is ''"):
        run(Experiment(model, spec="acb", image_size=8, training=Recipe(epochs=1), out=out, resume=True))


def test_epochs_with_rounding_train_the_stem_too() -> None:
    assert Recipe(freeze="1", qat=QuantizationAware(1)).with_rounding().freeze == ""

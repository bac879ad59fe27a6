"""`repfx recipe`: one recipe, and the schema of all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from repfx.change.schedule import SCHEDULES
from repfx.commands.recipe import recipe_schema
from repfx.records.plain_values import flat
from repfx.training.experiment import Experiment
from repfx.training.named_recipes import shipped_recipes
from repfx.training.recipe_file import read_recipe


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads(json.dumps(recipe_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", shipped_recipes())
def test_each_shipped_recipe_fits_the_schema(name: str, validator: Any) -> None:
    validator.validate(read_recipe(name))


def test_names_of_timm_fit_the_schema(validator: Any) -> None:
    validator.validate({"training": {"optimizer": "timm:lamb", "rates": "timm:tanh"}})


def test_what_a_run_writes_down_fits_the_schema(validator: Any) -> None:
    for schedule in (None, {"name": "dyrep", "interval": 2}, {"name": "net.py:Own", "speed": 3}):
        validator.validate(json.loads(json.dumps(Experiment(schedule=schedule).values)))


@pytest.mark.parametrize(
    ("values", "at"),
    [
        ({"modell": {}}, []),
        ({"training": {"epoch": 3}}, ["training"]),
        ({"training": {"epochs": "3"}}, ["training", "epochs"]),
        ({"training": {"epochs": 0}}, ["training", "epochs"]),
        ({"training": {"optimizer": "Adamm"}}, ["training", "optimizer"]),
        ({"training": {"milestones": [1, "2"]}}, ["training", "milestones", 1]),
        ({"training": {"augmentation": {"cut": 1}}}, ["training", "augmentation"]),
        ({"training": {"distillation": {"weights": "t.pt"}}}, ["training", "distillation"]),
        ({"schedule": {"name": "dyrep", "speed": 1}}, ["schedule"]),
        ({"schedule": {"name": "dyrap"}}, ["schedule"]),
        ({"out": "runs"}, []),
    ],
)
def test_a_mistake_is_marked_where_it_is(values: dict[str, Any], at: list[object], validator: Any) -> None:
    (error,) = validator.iter_errors(values)
    assert list(error.absolute_path) == at


def test_every_key_and_schedule_is_explained(validator: Any) -> None:
    schema = validator.schema
    assert schema["properties"]["training"]["properties"]["keep"]["anyOf"] == [{"enum": ["best", "both", "last"]}]
    assert schema["properties"]["training"]["properties"]["learning_rate"]["default"] == 2e-3
    told = [key for key in flat(schema["properties"]) if key.endswith(".description")]
    assert len(told) > 50
    named = [each["properties"]["name"].get("const") for each in schema["properties"]["schedule"]["anyOf"]]
    assert named == [*SCHEDULES, None]


def test_a_recipe_is_checked_and_shown(tmp_path: Path, repfx_command: Any) -> None:
    shown = repfx_command("recipe", "show", "dyrep-vgg16-cifar10")
    assert shown.out == shipped_recipes()["dyrep-vgg16-cifar10"].read_text()
    values = repfx_command("recipe", "show", "dyrep-vgg16-cifar10", "--json")
    assert json.loads(values.out) == read_recipe("dyrep-vgg16-cifar10")
    (tmp_path / "own.toml").write_text("[training]\nepoch = 3\n")
    for arguments, message in (
        (["show", tmp_path / "own.toml"], "no key in training 'epoch'; did you mean 'epochs'?"),
        (["show", "dyrep-vgg16-cifar"], "did you mean 'dyrep-vgg16-cifar10'?"),
        (["show"], "repfx recipe show needs the name of a recipe"),
        (["schema", "dyrep-vgg16-cifar10"], "there is one schema for all recipes: leave 'dyrep-vgg16-cifar10' out"),
    ):
        refused = repfx_command("recipe", *arguments)
        assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
        assert message in refused.err
    assert json.loads(repfx_command("recipe", "schema").out) == json.loads(json.dumps(recipe_schema()))

"""Recipes: shipped ones fit their nets; files are read, overridden and refused as they should be."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import repfx
from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.branch import fitting
from repfx.blocks.presets import SpecLike
from repfx.blocks.selection import Selection, spec_at
from repfx.change.schedule import SCHEDULES
from repfx.cli import main
from repfx.data.augmentation import Augmentation
from repfx.errors import InvalidInput, UnknownName
from repfx.recipes import nets
from repfx.records.plain_values import from_plain, to_plain
from repfx.search.base import Search
from repfx.search.space import Space
from repfx.training import experiment
from repfx.training.experiment import Experiment
from repfx.training.models import ModelReference
from repfx.training.named_recipes import shipped_recipes
from repfx.training.optimizers import make_optimizer
from repfx.training.recipe_file import read_recipe
from repfx.training.run_folder import ARCHITECTURE, METRICS, RECIPE, spec_of

TINY = f"{Path(__file__).parents[1] / 'tiny.py'}:net"
CLASSES = {"CIFAR10": 10, "CIFAR100": 100, "imagenet": 1000}


@cache
def convs_of(name: str, options: str, classes: int, size: int) -> dict[str, ConvSpec]:
    """The convs of a net by path, once an image has gone through the net on the meta device."""
    with torch.device("meta"):
        model = ModelReference(name, classes, json.loads(options)).build()
        assert model(torch.empty(2, 3, size, size)).shape == (2, classes)
    return {path: ConvSpec.of(module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def shipped(name: str) -> Experiment:
    return from_plain(Experiment, read_recipe(name))


def convs_in(model: ModelReference, asked: Experiment) -> dict[str, ConvSpec]:
    """Convs of a model for the data that a recipe asks for."""
    return convs_of(model.name, json.dumps(dict(model.options)), CLASSES[asked.data.name], asked.image_size or 32)


def schedule_of(asked: Experiment) -> Any:
    options = dict(asked.schedule or {})
    spec = {} if asked.spec is None else {"spec": spec_of(asked.spec)}
    return SCHEDULES[options.pop("name")].over(asked.training.epochs, **spec, **options)


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_says_how_to_train_its_net(name: str) -> None:
    asked = shipped(name)
    assert from_plain(Experiment, to_plain(asked)) == asked
    assert f"-{asked.data.name.lower()}" in name
    assert convs_in(asked.model, asked)
    teacher = asked.training.distillation and asked.training.distillation.teacher
    assert bool(teacher) == name.endswith("-distilled")
    if teacher and not teacher.name.startswith("timm:"):  # timm's import alone takes seconds
        assert convs_in(teacher, asked)
    assert (asked.training.optimizer, asked.training.warm_up is None) == ("SGD", False)
    make_optimizer(nn.Linear(1, 1), asked.training, torch.device("cpu"))


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if shipped(name).schedule is None])
def test_a_shipped_spec_fits_its_net(name: str) -> None:
    asked = shipped(name)
    if name.startswith("des-retrain-"):
        assert asked.spec == "architecture.json"  # a search has yet to find this file
    else:
        assert bool(expandable(spec_of(asked.spec), convs_in(asked.model, asked))) != name.startswith("plain-")


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if shipped(name).schedule is not None])
def test_a_shipped_schedule_fits_its_net(name: str) -> None:
    asked = shipped(name)
    schedule = schedule_of(asked)
    expanded = expandable(schedule.spec, convs_in(asked.model, asked))
    assert expanded
    if isinstance(schedule, repfx.schedules.RepAn):
        assert schedule.cycles * schedule.epochs == asked.training.epochs
    if isinstance(schedule, Search):
        own = ["origin"] if schedule.origin else []
        paths = [(site, path) for site, kinds in expanded.items() for path in [*own, *kinds]]
        assert Space(tuple(paths)).budget(schedule.budget) < len(paths)


IMAGENET, SMALL = "repan-resnet18-imagenet", "repan-repvgg-a1-quarter-cifar100"
RESNET: tuple[str, dict[str, Any]] = ("repfx.recipes.nets:resnet18", {})
MOBILENET: tuple[str, dict[str, Any]] = ("repfx.recipes.nets:mobilenet", {})


@pytest.mark.parametrize(
    ("recipe", "model", "spec"),
    [
        (SMALL, ("repfx.recipes.nets:repvgg", {"size": "B3", "width": 0.25, "small_images": True}), None),
        *[(SMALL, RESNET, spec) for spec in ("dbb", "acb", "orepa")],
        *[(IMAGENET, (f"torchvision:{name}", {}), None) for name in ("resnet34", "resnet50", "resnet101")],
        (IMAGENET, MOBILENET, "dbb"),
        ("dyrep-resnet18-imagenet", MOBILENET, None),
        ("dyrep-resnet18-imagenet", ("repfx.recipes.nets:repvgg", {"size": "A2"}), None),
        ("repnas-repvgg-a0-imagenet", ("repfx.recipes.nets:repvgg", {"size": "B1"}), None),
    ],
)
def test_a_shipped_recipe_fits_the_other_nets_of_its_paper(recipe: str, model: Any, spec: str | None) -> None:
    asked = shipped(recipe)
    asked = replace(asked, model=ModelReference(model[0], options=model[1]), spec=spec or asked.spec)
    expanded = expandable(schedule_of(asked).spec, convs_in(asked.model, asked))
    assert len(expanded) > 8


def expandable(spec: SpecLike, convs: dict[str, ConvSpec]) -> dict[str, list[str]]:
    """Branch kinds that a spec puts beside each conv larger than 1×1; every pattern of the spec must match a conv."""
    if isinstance(spec, dict):
        Selection.of(spec).require_used({path: str(conv) for path, conv in convs.items()})
    wide = {path: conv for path, conv in convs.items() if not conv.is_pointwise}
    found = {path: fitting(spec_at(spec, path).branches_for(conv), conv)[0] for path, conv in wide.items()}
    return {path: [branch.kind for branch in branches] for path, branches in found.items() if branches}


def test_what_recipes_leave_to_the_schedules_is_as_in_the_papers() -> None:
    dyrep = [schedule_of(shipped(name)) for name in ("dyrep-vgg16-cifar10", "dyrep-resnet50-imagenet")]
    assert [(each.interval, each.until, each.metric) for each in dyrep] == [(15, 500, "synflow"), (5, 101, "synflow")]
    repan = schedule_of(shipped("repan-repvgg-a1-quarter-cifar100"))
    assert (repan.cycles, repan.epochs, repan.warm_up) == (5, 30, 5)
    large = schedule_of(shipped("repan-resnet18-imagenet"))
    assert (large.cycles, large.epochs, large.warm_up) == (3, 125, 40)
    for name, rate, decay in (("repvgg-a1-quarter-cifar100", 0.75, 2e-4), ("resnet18-imagenet", 0.3, 3e-5)):
        for asked in (shipped(f"repan-{name}"), shipped(f"repan-{name}-distilled")):
            assert (asked.training.learning_rate, asked.training.weight_decay) == (rate, decay)
    for name in ("repnas-vgg16-cifar10", "repnas-repvgg-a0-imagenet"):  # the proportions of the authors' 15, 35 and 100
        asked, repnas = shipped(name), schedule_of(shipped(name))
        assert (10 * repnas.warm_up, 3 * repnas.epochs, asked.training.clip) == (*[asked.training.epochs] * 2, 5.0)
        assert (repnas.learning_rate, repnas.weight_decay) == (1e-4, 5e-4)
    des = schedule_of(shipped("des-vgg16-cifar10"))
    assert (des.population, des.nets, des.spec, des.crossover, des.learning_rate) == (128, 5, "ireps", 0.5, 1e-4)


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (nets.vgg16, 14.72),
        (nets.resnet18, 11.17),
        (nets.mobilenet, 4.23),
        (lambda: nets.repvgg(size="A0"), 8.3),
        (lambda: nets.repvgg(size="A1"), 12.78),
        (lambda: nets.repvgg(size="A2"), 25.49),
        (lambda: nets.repvgg(size="B2"), 80.31),
        (lambda: nets.repvgg(size="B3"), 110.96),
    ],
)
def test_the_nets_are_as_large_as_in_the_papers(build: Any, millions: float) -> None:
    """RepVGG's sizes are those of the fused nets (RepNAS, table 4), which have one bias in place of a BatchNorm's γ and β."""
    with torch.device("meta"):
        model = build()
    fused = isinstance(model[0], nn.Sequential) if isinstance(model, nn.Sequential) else False
    betas = sum(module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)) * fused
    assert (sum(each.numel() for each in model.parameters()) - betas) / 1e6 == pytest.approx(millions, abs=0.01)


def test_a_net_of_unknown_size_is_refused() -> None:
    with pytest.raises(UnknownName, match="no size of RepVGG 'A9'"):
        nets.repvgg(size="A9")


# --- files -------------------------------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    path = folder / "own.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nepoch = 3", "no key in training 'epoch'; did you mean 'epochs'"),
        ("modell = 1", "no key 'modell'; did you mean 'model'"),
        ("[training.augmentation]\ncut = 1", "no key in training.augmentation 'cut'; did you mean 'cutout'"),
        ("[training]\nepochs = '3'", "training.epochs is '3'; it must be a whole number"),
        ("[training.distillation]\nalpha = 0.5", "training.distillation lacks something"),
        ("[training]\nwarm_up = 9.0", "warm_up is 9.0; it must be from 0 to the 5 epochs"),
        ("epochs =", "is no TOML"),
    ],
)
def test_a_file_that_says_what_can_not_be_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        from_plain(Experiment, read_recipe(written(tmp_path, text)))


def test_paths_start_from_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("")
    (tmp_path / "data.npz").write_text("")
    text = 'weights = "none.pt"\n[model]\nname = "net.py:build"\n[data]\nname = "data.npz"\nroot = "data.npz"'
    values = read_recipe(written(tmp_path, text), trust=True)
    assert values["model"]["name"] == f"{tmp_path / 'net.py'}:build"
    assert values["data"] == {"name": str(tmp_path / "data.npz"), "root": "data.npz"}
    assert values["weights"] == "none.pt"  # no such file, so the name stays as it is written


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *map(str, arguments), "--json"])
    assert not stopped.value.code


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Images of 32 × 32 in three classes, told apart by their colour."""
    labels = np.arange(60) % 3
    images = np.random.default_rng(0).integers(0, 60, (60, 32, 32, 3), dtype=np.uint8)
    images[np.arange(60), :, :, labels] += 150
    np.savez(tmp_path / "colours.npz", x_train=images, y_train=labels, x_test=images[:9], y_test=labels[:9])
    return tmp_path / "colours.npz"


def test_a_file_is_followed_but_for_what_is_overridden(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line overrides single keys of a file; an empty spec trains the plain model."""
    asked: list[Any] = []

    def train(*arguments: object, **options: object) -> None:
        asked.extend(arguments)
        raise InvalidInput("that is enough.")

    monkeypatch.setattr(experiment, "train", train)
    text = f'spec = []\n[model]\nname = "{TINY}"\n[data]\nname = "{colours.name}"\n[training]\nepochs = 3\nclip = 5.0'
    recipe = written(tmp_path, f"{text}\n[training.augmentation]\nflip = 0.5\ncutout = 16")
    changes = ("--epochs", "1", "--set", "training.augmentation.cutout=2")
    with pytest.raises(SystemExit):
        main(["train", "--recipe", str(recipe), "--trust", "--out", str(tmp_path / "out"), *changes])
    model, data, training, schedule = asked
    assert schedule is None
    assert not any(isinstance(module, repfx.RepBlock) for module in model.modules())
    assert (len(data.train), data.example_shape, model[-1].out_features) == (60, (1, 32, 32), 3)
    assert (training.epochs, training.clip) == (1, 5.0)
    assert training.augmentation == Augmentation(flip=0.5, cutout=2)


def test_a_pattern_of_a_schedule_s_spec_that_fits_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", TINY, "--schedule", "repan", "--spec", '{"layer*": "dbb"}', "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(["train", *options])
    assert "the spec's pattern 'layer*' fits no site" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dyrep-vgg16-cifar10", "repvgg-a1-quarter-cifar100"])
def test_a_shipped_recipe_runs(name: str, colours: Path, tmp_path: Path) -> None:
    run(
        "--recipe",
        name,
        "--data",
        colours,
        "--epochs",
        1,
        "--batch-size",
        16,
        "--workers",
        0,
        "--out",
        tmp_path / "out",
    )
    assert (tmp_path / "out" / METRICS).is_file()
    assert read_recipe(tmp_path / "out" / RECIPE)["training"]["epochs"] == 1


@pytest.mark.slow
def test_what_a_search_has_found_is_trained_anew(colours: Path, tmp_path: Path) -> None:
    """The recipes of a search and of its retraining run one after the other, on a smaller net."""
    short = ["--data", colours, "--model", TINY, "--image-size", 8, "--batch-size", 16, "--workers", 0]
    options = [f"--schedule-option={option}" for option in ("epochs=2", "warm_up=1", "generation=1", "population=4")]
    run("--recipe", "des-vgg16-cifar10", *short, "--epochs", 2, *options, "--out", tmp_path / "search")
    found = tmp_path / "search" / ARCHITECTURE
    again = ["--epochs", 1, "--spec", found, "--set", 'training.auxiliary.module="2"']
    run("--recipe", "des-retrain-vgg16-cifar10", *short, *again, "--out", tmp_path / "again")
    first, second = (json.loads((tmp_path / run / METRICS).read_text()) for run in ("search", "again"))
    assert first["cost"]["expanded"]["macs"] == second["cost"]["expanded"]["macs"] > second["cost"]["plain"]["macs"]

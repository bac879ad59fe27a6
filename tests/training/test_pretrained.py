"""Pretrained weights of torchvision and timm, made here, and learning rates by layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from repfx.errors import InvalidInput
from repfx.passes.expand import expand
from repfx.training import experiment
from repfx.training.experiment import Experiment, run
from repfx.training.loop import train
from repfx.training.models import ModelReference, load_pretrained
from repfx.training.optimizers import make_optimizer
from repfx.training.recipe import Recipe
from tests.tiny import net
from tests.training.test_training import pictures

SMALL = "shufflenet_v2_x0_5"


@pytest.fixture
def torchvision_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights of a model in the cache of torchvision, where a download would have put them."""
    from torchvision import models

    torch.manual_seed(7)
    weights: dict[str, torch.Tensor] = models.get_model(SMALL).state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / models.get_model_weights(SMALL).DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(weights, file)
    return weights


@pytest.mark.parametrize("classes", [4, 1000])
def test_the_weights_of_torchvision_are_taken_but_for_another_last_layer(
    classes: int, torchvision_cache: dict[str, torch.Tensor]
) -> None:
    reference = ModelReference(f"torchvision:{SMALL}", classes)
    model = reference.build()
    head = model.get_parameter("fc.weight").clone()
    load_pretrained(model, reference)
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in torchvision_cache.items() if not key.startswith("fc."))
    assert torch.equal(found["fc.weight"], head if classes == 4 else torchvision_cache["fc.weight"])


def test_the_weights_of_timm_are_taken_from_their_file(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(7)
    weights = timm.create_model("test_resnet").state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
    reference = ModelReference("timm:test_resnet", 4, overlay)
    model = reference.build()
    load_pretrained(model, reference)
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items() if not key.startswith("fc."))
    assert found["fc.weight"].shape[0] == 4


def test_what_has_no_weights_is_refused(torchvision_cache: object, tmp_path: Path) -> None:
    own = ModelReference(f"{Path(__file__).parents[1] / 'tiny.py'}:net")
    with pytest.raises(
        InvalidInput, match=r"no pretrained weights for .*: only models of torchvision and timm have some"
    ):
        load_pretrained(net(), own)
    other = ModelReference(f"torchvision:{SMALL}", 4)
    with pytest.raises(
        InvalidInput, match=r"don't fit \d+ layers of the model, such as .*: leave out options that change its layers"
    ):
        load_pretrained(ModelReference("torchvision:shufflenet_v2_x1_0", 4).build(), other)
    missing = ModelReference("timm:test_resnet", 4, {"pretrained_cfg_overlay": {"file": str(tmp_path / "no.pth")}})
    with pytest.raises(InvalidInput, match=r"the pretrained weights of 'timm:test_resnet' can't be loaded: "):
        load_pretrained(missing.build(), missing)
    with pytest.raises(InvalidInput, match="give --weights or --pretrained"):
        run(Experiment(own, weights=Path("w.pt"), pretrained=True, out=tmp_path / "out"))


@pytest.mark.slow
def test_a_training_begins_with_the_function_of_the_pretrained_model(
    torchvision_cache: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[nn.Module] = []

    def train(model: nn.Module, *rest: object, plain: nn.Module, **options: object) -> None:
        begun.extend([model, plain])
        raise InvalidInput("enough.")

    monkeypatch.setattr(experiment, "train", train)
    job = Experiment(
        ModelReference(f"torchvision:{SMALL}"), image_size=32, spec="acb", pretrained=True, out=tmp_path / "out"
    )
    with pytest.raises(InvalidInput, match="enough"):
        run(job)
    model, plain = (each.double().eval() for each in begun)
    assert torch.equal(plain.get_parameter("conv1.0.weight"), torchvision_cache["conv1.0.weight"].double())
    x = torch.randn(2, 3, 40, 32, dtype=torch.float64)
    with torch.no_grad():
        assert (model(x) - plain(x)).abs().max() < 1e-9
    assert replace(job, resume=True).values["pretrained"] is True


# --- learning rates by layer ---------------------------------------------------------------------------------------------


def test_each_stage_learns_more_slowly_than_the_next() -> None:
    model = net(2)  # whose children 0, 1, 3, 4 and 8 have parameters
    optimizer = make_optimizer(model, Recipe(layer_decay=0.5), torch.device("cpu"))
    scales = {id(each): group["rate_scale"] for group in optimizer.param_groups for each in group["params"]}
    found = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    expected = {"0": 0.0625, "1": 0.125, "3": 0.25, "4": 0.5, "8": 1.0}
    assert found == {name: expected[name.partition(".")[0]] for name in found}
    whole = make_optimizer(model, Recipe(), torch.device("cpu"))
    assert len(whole.param_groups) == 1


def test_branches_learn_at_the_rate_of_their_stage_and_vectors_need_not_decay() -> None:
    model = expand(net(2), "acb")
    recipe = Recipe(layer_decay=0.5, decay_vectors=False)
    groups = make_optimizer(model, recipe, torch.device("cpu")).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stages = [{names[id(each)].partition(".")[0] for each in group["params"]} for group in groups]
    assert [*map(len, stages)] == [1] * len(groups)
    assert all(group["weight_decay"] == (0.01 if group["params"][0].ndim > 1 else 0) for group in groups)
    rates = {stage: group["rate_scale"] for (stage,), group in zip(stages, groups)}
    assert list(rates.values()) == sorted(rates.values())


@pytest.mark.slow
def test_the_rates_of_layers_hold_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *rest: seen.append([g["lr"] for g in self.param_groups])
    )
    history = train(net(2), pictures(), Recipe(epochs=1, batch_size=40, layer_decay=0.5, warm_up=0.0)).history
    of_the_model = [rates for rates in seen if len(rates) > 1]  # one more step is a trial on a small matrix
    assert of_the_model == [[pytest.approx(2e-3 * 0.5**above) for above in (4, 3, 2, 1, 0)]]
    assert history.epochs[-1].learning_rate == pytest.approx(2e-3)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_decay_that_can_not_be_is_refused(value: float) -> None:
    with pytest.raises(InvalidInput, match=f"layer_decay is {value}; it must be more than 0 and at most 1"):
        Recipe(layer_decay=value)

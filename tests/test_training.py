"""The training loop: what it learns, repeats and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from repfx.dataset import DataSet
from repfx.errors import InvalidInput, RepfxError
from repfx.training import Predictions, Recipe, Step, predict, train
from tests.tiny import net


def bright_or_dark(count: int = 33) -> DataSet:
    labels = torch.arange(count) % 2
    images = (2.0 * labels - 1)[:, None, None, None] + 0.1 * torch.randn(count, 1, 8, 8)
    return DataSet(TensorDataset(images, labels), TensorDataset(images, labels), ("dark", "bright"))


def first_weight(model: Any) -> Tensor:
    weight: Tensor = model[0].weight.detach().clone()
    return weight


def weights_after(seed: int, data: DataSet) -> Tensor:
    torch.manual_seed(seed)
    model = net(2)
    train(model, data, Recipe(epochs=1, batch_size=8, seed=seed))
    return first_weight(model)


def test_it_learns_and_tells_each_step() -> None:
    data, model = bright_or_dark(), net(2)
    steps: list[Step] = []
    losses = train(model, data, Recipe(epochs=3, batch_size=8, learning_rate=0.01), steps.append).losses
    assert [step.number for step in steps] == list(range(1, 13))  # the 33rd image alone would be no batch
    assert (steps[-1].total, steps[-1].epoch) == (12, 3)
    assert losses[-1] < losses[0]
    assert predict(model, data.test, 7).accuracy == 1
    assert not model.training


def test_equal_seeds_give_equal_weights() -> None:
    data = bright_or_dark()
    assert torch.equal(weights_after(1, data), weights_after(1, data))
    assert not torch.equal(weights_after(1, data), weights_after(2, data))


class Auxiliary(nn.Module):
    """Gives its logits in a tuple or a dict, as googlenet or a segmentation model would."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner: nn.Sequential = net(2)
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        logits = self.inner(x)
        return {"tuple": (logits, None), "dict": {"aux": 0, "out": logits}, "map": x}[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_the_main_output_is_trained(kind: str) -> None:
    data, model = bright_or_dark(), Auxiliary(kind)
    before = first_weight(model.inner)
    train(model, data, Recipe(epochs=1, batch_size=16))
    assert not torch.equal(first_weight(model.inner), before)


def test_what_is_no_classifier_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"no classifier: its output is \(1, 1, 8, 8\)"):
        train(Auxiliary("map"), bright_or_dark(), Recipe())


def test_an_image_that_does_not_fit_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 9), nn.Flatten(), nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match="--image-size"):
        train(model, bright_or_dark(), Recipe())


def test_too_few_classes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="gives 1 classes, the data has 2"):
        train(net(1), bright_or_dark(), Recipe())


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    model = net(2)
    model.get_parameter("0.weight").data.fill_(float("nan"))
    with pytest.raises(RepfxError, match="the loss is nan in epoch 1"):
        train(model, bright_or_dark(), Recipe())


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch_size": 1}, {"learning_rate": 0.0}, {"workers": -1}])
def test_a_recipe_that_can_not_be_used_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(change))):
        Recipe(**change)  # type: ignore[arg-type]


def test_flips_are_counted_whether_right_or_wrong() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    first = Predictions(torch.tensor([0, 1, 1, 1]), labels)
    second = Predictions(torch.tensor([0, 2, 2, 2]), labels)
    assert (first.accuracy, first.flips(second), first.flips(first)) == (0.5, 3, 0)

"""The images on which a search scores its candidates: how many there are, who reads them, and that nothing is trained on them."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from repfx.data.dataset import DataSet
from repfx.data.predictions import mean_log_likelihood
from repfx.errors import InvalidInput
from repfx.schedules import RandomSearch
from repfx.training import loop
from repfx.training.loop import hold_out, train
from repfx.training.recipe import Recipe
from tests.tiny import net


def images_of(*counts: int) -> TensorDataset:
    """Images of 1 × 8 × 8, each full of its own number, with so many of each class."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    return TensorDataset(torch.arange(float(len(labels)))[:, None, None, None].expand(-1, 1, 8, 8), labels)


def numbers_in(images: Any) -> list[int]:
    return [int(image[0, 0, 0]) for image, _ in images]


@pytest.mark.parametrize(("most", "expected"), [(0, {0: 6, 1: 4}), (10, {0: 6, 1: 4}), (6, {0: 3, 1: 2})])
def test_a_bound_takes_every_further_image_of_each_class(most: int, expected: dict[int, int]) -> None:
    kept, held_out = hold_out(images_of(60, 40), most)
    assert Counter(int(label) for _, label in held_out) == expected  # type: ignore[attr-defined]
    assert sorted(numbers_in(kept) + numbers_in(held_out)) == list(range(100))


@pytest.mark.parametrize(
    ("most", "said"),
    [
        (0, "fewer than 10 training images of each class: too few to score candidates on."),
        (1, "fewer than 18 training images of each class: too few to score candidates on with scored_images = 1."),
    ],
)
def test_too_few_images_are_refused(most: int, said: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(said)):
        hold_out(images_of(9, 9), most)


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(InvalidInput, match="scored_images is -1; it must be at least 0"):
        Recipe(scored_images=-1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_each_candidate_is_scored_on_the_images_held_out_by_the_recipe_s_workers(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def noted(net: nn.Module, batches: Any, device: Any) -> float:
        seen.append((sum(len(y) for _, y in batches), batches.num_workers))
        return mean_log_likelihood(net, batches, device)

    monkeypatch.setattr(loop, "mean_log_likelihood", noted)
    data = DataSet(images_of(40, 40), images_of(4, 4), ("dark", "bright"))
    search = RandomSearch(population=3, generation=1, nets=1, warm_up=1, epochs=2, spec="repvgg", budget=0.5)
    train(net(2), data, Recipe(epochs=2, batch_size=8, workers=workers, scored_images=4), search)
    assert seen
    assert set(seen) == {(4, workers)}


def test_the_score_is_the_mean_log_likelihood() -> None:
    class Sure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[0.0, 1.0]], dtype=x.dtype).expand(len(x), 2)

    batches = [(torch.zeros(3, 1), torch.tensor([1, 1, 0])), (torch.zeros(1, 1), torch.tensor([1]))]
    expected = torch.log_softmax(torch.tensor([0.0, 1.0]), 0)
    assert mean_log_likelihood(Sure(), batches, "cpu") == pytest.approx(float(3 * expected[1] + expected[0]) / 4)

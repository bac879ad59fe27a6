"""A plain training loop: AdamW, a learning rate that rises and falls once, and what a classifier predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

import repfx
from repfx.architecture import Architecture
from repfx.dataset import DataSet, Images, every
from repfx.errors import InvalidInput, RepfxError, first_line
from repfx.journaling import Action
from repfx.schedule import Schedule, Unchanged
from repfx.search import Search


@dataclass(frozen=True)
class Recipe:
    """How to train. `learning_rate` is the highest of the cycle."""

    epochs: int = 5
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 0
    device: str = "cpu"
    workers: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("epochs", 1), ("batch_size", 2), ("workers", 0)):
            if getattr(self, name) < lowest:
                raise InvalidInput(f"{name} is {getattr(self, name)}; it must be at least {lowest}.")
        if not 0 < self.learning_rate < math.inf:
            raise InvalidInput(f"learning_rate is {self.learning_rate}; it must be a positive number.")


@dataclass(frozen=True)
class Step:
    """Where the training stands after a step, of `total`, counted from 1."""

    number: int
    total: int
    epoch: int
    loss: float


@dataclass(frozen=True)
class Trained:
    """What training gives beside the model: the mean loss of each epoch, and what a search has found."""

    losses: list[float]
    architecture: Architecture | None


def train(
    model: nn.Module,
    data: DataSet,
    recipe: Recipe,
    on_step: Callable[[Step], None] = lambda step: None,
    schedule: Schedule | None = None,
    on_actions: Callable[[int, Sequence[Action]], None] = lambda epoch, actions: None,
) -> Trained:
    """Train a model in place on a data set. Equal seeds give equal weights.

    Args:
        schedule: changes the model's structure on the way; the learning rate begins anew with each of its cycles. If it scores candidates,
            it does so on every tenth training image of each class, on which the model is then not trained.
        on_actions: hears what was changed at a time, and after how many epochs.

    Raises:
        InvalidInput: the model doesn't take the images or gives no logits for their classes.
        RepfxError: the loss is no longer finite.
    """
    check_fit(model, data, recipe.device)
    images, score = data.train, None
    if isinstance(schedule, Search) and schedule.needs_score:
        images, held_out = hold_out(images)
        score = partial(mean_log_likelihood, images=held_out, batch_size=recipe.batch_size, device=recipe.device)
    loader = _training_batches(images, recipe)
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    total = recipe.epochs * len(loader)
    driver = repfx.Driver(
        model, optimizer, schedule or Unchanged(), calibrate=loader, steps_per_epoch=len(loader), score=score
    )
    on_actions(0, [action for _, action in driver.history])
    cycle = (driver.schedule.cycle or recipe.epochs) * len(loader)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: share_of_rate(done % cycle, cycle))
    losses, number = [], 0
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        sum_of_losses = 0.0
        for x, y in loader:
            loss = _step(model, x.to(recipe.device), y.to(recipe.device), optimizer, driver)
            rates.step()
            number += 1
            if not math.isfinite(loss):
                raise RepfxError(
                    f"the loss is {loss} in epoch {epoch}: try a lower learning rate than {recipe.learning_rate}."
                )
            sum_of_losses += loss
            on_step(Step(number, total, epoch, loss))
        losses.append(sum_of_losses / len(loader))
        on_actions(epoch, driver.after_epoch())
    model.eval()
    return Trained(losses, None if driver.search is None else driver.search.architecture)


def hold_out(images: Images) -> tuple[Images, Images]:
    """All but every tenth image of each class, and these.

    Raises:
        InvalidInput: there are too few.
    """
    labels = torch.tensor([int(images[index][1]) for index in range(len(images))])  # type: ignore[arg-type]
    chosen = every(10, labels)
    if not chosen.any():
        raise InvalidInput("there are fewer than 10 training images of each class: too few to score candidates on.")
    return Subset(images, (~chosen).nonzero().flatten().tolist()), Subset(images, chosen.nonzero().flatten().tolist())


@torch.no_grad()
def mean_log_likelihood(net: nn.Module, images: Images, batch_size: int, device: str) -> float:
    """Of the true classes, over images; finer than accuracy, where candidates are nearly alike."""
    total, count = 0.0, 0
    for x, y in DataLoader(images, batch_size):
        total -= F.cross_entropy(logits_of(net(x.to(device))), y.to(device), reduction="sum").item()
        count += len(y)
    return total / count


def share_of_rate(done: int, total: int) -> float:
    """What part of the highest learning rate a step has: linearly up for a fifth of the steps, then a cosine down.

    >>> [round(share_of_rate(done, 10), 2) for done in range(10)]
    [0.5, 1.0, 1.0, 0.96, 0.85, 0.69, 0.5, 0.31, 0.15, 0.04]
    """
    warm_up = max(1, total // 5)
    if done < warm_up:
        return (done + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / max(1, total - warm_up)))


def _training_batches(images: Images, recipe: Recipe) -> DataLoader[Any]:
    count = len(images)  # type: ignore[arg-type]
    if count < 2:
        raise InvalidInput(f"there are {count} images to train on; BatchNorm needs at least 2.")
    return DataLoader(
        images,
        recipe.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(recipe.seed),
        drop_last=count % recipe.batch_size == 1,  # BatchNorm can't train on a batch of one
        num_workers=recipe.workers,
    )


def _step(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, driver: repfx.Driver) -> float:
    optimizer.zero_grad()
    total = 0.0
    for share in driver.shares():
        loss = share * F.cross_entropy(logits_of(model(x)), y)
        loss.backward()
        total += loss.item()
    driver.after_backward()
    optimizer.step()
    return total


def logits_of(output: Any) -> Tensor:
    """The main output of a classifier, which may come in a tuple or a dict with auxiliary ones."""
    if isinstance(output, Mapping):
        output = output.get("out", next(iter(output.values()), None))
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InvalidInput(f"the model is no classifier: its output is {found}, not (images, classes).")
    return output


def check_fit(model: nn.Module, data: DataSet, device: str) -> None:
    """Run one image in eval mode.

    Raises:
        InvalidInput: the model doesn't take the images or gives no logits for their classes.
    """
    model.eval()
    try:
        with torch.no_grad():
            logits = logits_of(model(data.test[0][0][None].to(device)))
    except InvalidInput:
        raise
    except Exception as error:
        advice = "the model may need another --image-size"
        raise InvalidInput(
            f"the model fails on an image {data.example_shape} ({first_line(error)}): {advice}."
        ) from error
    if logits.shape[1] < len(data.classes):
        raise InvalidInput(
            f"the model gives {logits.shape[1]} classes, the data has {len(data.classes)}: set --num-classes."
        )


@dataclass(frozen=True)
class Predictions:
    """Predicted classes and the true ones, `(images,)` each."""

    predicted: Tensor
    labels: Tensor

    @property
    def accuracy(self) -> float:
        """Fraction that is right."""
        return (self.predicted == self.labels).double().mean().item()

    def flips(self, other: Predictions) -> int:
        """How many images the other predicts differently."""
        return int((self.predicted != other.predicted).sum())


def predict(compute: Callable[[Tensor], Any], images: Images, batch_size: int, workers: int = 0) -> Predictions:
    """Run a classifier over images: anything that maps a batch to logits."""
    predicted, labels = [], []
    with torch.no_grad():
        for x, y in DataLoader(images, batch_size, num_workers=workers):
            predicted.append(logits_of(compute(x)).argmax(1).cpu())
            labels.append(y)
    return Predictions(torch.cat(predicted), torch.cat(labels))

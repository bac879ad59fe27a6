"""Predictions of a classifier on images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from repfx.data.dataset import DataSet, Images
from repfx.errors import InvalidInput, first_line


def logits_of(output: Any) -> Tensor:
    """Return the main output of a classifier, which may come in a tuple or a dict with auxiliary outputs."""
    if isinstance(output, Mapping):
        output = output.get("out", next(iter(output.values()), None))
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InvalidInput(f"the model is no classifier: its output is {found}, not (images, classes).")
    return output


def labels_of_logits(model: nn.Module, classes: Sequence[str], x: Tensor) -> tuple[str, ...]:
    """Return a name for each number that a classifier gives for an image. It may give more of them than there are classes."""
    with torch.no_grad():
        count = logits_of(model(x)).shape[1]
    return (*classes, *(f"unused {place}" for place in range(len(classes), count)))


def check_fit(model: nn.Module, data: DataSet, device: str | torch.device) -> int:
    """Run a model on one test image in eval mode, to see whether it fits the data.

    Returns:
        The number of logits.

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
            f"the model gives {logits.shape[1]} classes, the data has {len(data.classes)}: "
            f"set --num-classes {len(data.classes)}, or leave it out."
        )
    return logits.shape[1]


@torch.no_grad()
def mean_log_likelihood(net: nn.Module, images: Images, batch_size: int, device: str | torch.device) -> float:
    """Return the mean log-likelihood of the true classes. It tells nearly equal candidates apart better than accuracy does."""
    total, count = 0.0, 0
    for x, y in DataLoader(images, batch_size):
        total -= F.cross_entropy(logits_of(net(x.to(device))), y.to(device), reduction="sum").item()
        count += len(y)
    return total / count


@dataclass(frozen=True)
class Predictions:
    """Predicted classes and the true ones, `(images,)` each."""

    predicted: Tensor
    labels: Tensor

    @property
    def accuracy(self) -> float:
        """The fraction of predictions that are right."""
        return (self.predicted == self.labels).double().mean().item()

    def flips(self, other: Predictions) -> int:
        """Count the images that `other` predicts differently."""
        return int((self.predicted != other.predicted).sum())


def predict(compute: Callable[[Tensor], Any], images: Images, batch_size: int, workers: int = 0) -> Predictions:
    """Run a classifier over images; `compute` is anything that maps a batch to logits."""
    predicted, labels = [], []
    with torch.no_grad():
        for x, y in DataLoader(images, batch_size, num_workers=workers):
            predicted.append(logits_of(compute(x)).argmax(1).cpu())
            labels.append(y)
    return Predictions(torch.cat(predicted), torch.cat(labels))

"""Predictions of a classifier on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
def mean_log_likelihood(net: nn.Module, batches: Iterable[Any], device: str | torch.device) -> float:
    """Return the mean log-likelihood of the true classes. It tells nearly equal candidates apart better than accuracy does."""
    total, count = 0.0, 0
    for x, y in batches:
        total -= F.cross_entropy(logits_of(net(x.to(device))), y.to(device), reduction="sum").item()
        count += len(y)
    return total / count


@dataclass(frozen=True)
class Predictions:
    """Predicted classes and the true ones, `(images,)` each.

    Args:
        classes: number of classes that are told apart.
        among_five: whether the true class is among the five most likely ones; None if that isn't known.
    """

    predicted: Tensor
    labels: Tensor
    classes: int = 0
    among_five: Tensor | None = None

    @classmethod
    def of(cls, scores: Tensor, labels: Tensor) -> Predictions:
        """Read the predictions from scores, `(images, classes)`, of which the highest wins.

        >>> found = Predictions.of(torch.tensor([[0.1, 0.9], [0.3, 0.2]]), torch.tensor([1, 1]))
        >>> found.accuracy, found.top5
        (0.5, 1.0)
        """
        best = scores.topk(min(5, scores.shape[1]), 1).indices
        return cls(scores.argmax(1), labels, scores.shape[1], (best == labels[:, None]).any(1))

    @property
    def top5(self) -> float | None:
        """The fraction of images whose class is among the five most likely ones."""
        return None if self.among_five is None else self.among_five.double().mean().item()

    @property
    def confusion(self) -> Tensor:
        """The number of images of each class, by the class that was predicted: `(true classes, predicted classes)`."""
        pairs = self.labels * self.classes + self.predicted
        return torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    @property
    def accuracy(self) -> float:
        """The fraction of predictions that are right."""
        return (self.predicted == self.labels).double().mean().item()

    def flips(self, other: Predictions) -> int:
        """Count the images that `other` predicts differently."""
        return int((self.predicted != other.predicted).sum())


def predict(compute: Callable[[Tensor], Any], images: Images, batch_size: int, workers: int = 0) -> Predictions:
    """Run a classifier over images; `compute` is anything that maps a batch to logits."""
    with torch.no_grad():
        loader = DataLoader(images, batch_size, num_workers=workers)
        parts = [Predictions.of(logits_of(compute(x)).cpu(), y) for x, y in loader]
    predicted, labels, among = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("predicted", "labels", "among_five")
    )
    return Predictions(predicted, labels, parts[0].classes, among)

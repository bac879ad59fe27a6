"""How well a classifier does on labelled images: accuracy, top-5, each class, and where another classifier decides otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from repfx.data.dataset import DataSource
from repfx.data.predictions import Predictions
from repfx.errors import InvalidInput
from repfx.training.classifier import Classifier

MANY_CLASSES = 10  # from this number on, top-5 accuracy says something


@dataclass(frozen=True)
class Evaluation:
    """Predictions of a classifier on the test images of a data set, counted by class.

    Args:
        labels: name of each class.
        confusion: number of images of each class, by the class that was predicted: `(true classes, predicted classes)`.
        top5: share of the images whose class is among the five most likely ones.
        flips: number of images about which the other classifier decides otherwise; None without one.
        unreadable: reasons why image files were left out, by path.
    """

    labels: tuple[str, ...]
    confusion: Tensor
    top5: float
    flips: int | None = None
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        labels: Sequence[str],
        predictions: Predictions,
        *,
        flips: int | None = None,
        unreadable: Mapping[str, str] | None = None,
    ) -> Evaluation:
        """Count predictions by class. The labels name as many classes as the predictions tell apart."""
        return cls(tuple(labels), predictions.confusion, predictions.top5 or 0.0, flips, unreadable or {})

    @property
    def images(self) -> int:
        """The number of images."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """The share of the images whose class is predicted."""
        return float(self.confusion.diagonal().sum()) / self.images

    @property
    def by_class(self) -> dict[str, float]:
        """The share of each class's images that are predicted right, for the classes that have images."""
        totals = self.confusion.sum(1)
        return {
            name: int(self.confusion[place, place]) / int(totals[place])
            for place, name in enumerate(self.labels)
            if totals[place]
        }

    @property
    def confused(self) -> list[tuple[str, str, int]]:
        """Pairs of a class and another that was predicted in its place, with their number of images, the most first."""
        found = [
            (self.labels[true], self.labels[predicted], int(self.confusion[true, predicted]))
            for true, predicted in self.confusion.nonzero().tolist()
            if true != predicted
        ]
        return sorted(found, key=lambda row: -row[2])

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        found: dict[str, Any] = {"images": self.images, "accuracy": self.accuracy, "top5": self.top5}
        found |= {"by_class": self.by_class, "classes": list(self.labels), "confusion": self.confusion.tolist()}
        found |= {"unreadable": dict(self.unreadable)} if self.unreadable else {}
        return found if self.flips is None else {**found, "flips": self.flips}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation whose plain values `as_dict` returned.

        Raises:
            InvalidInput: the values are something else.
        """
        try:
            labels, confusion = tuple(map(str, values["classes"])), torch.tensor(values["confusion"], dtype=torch.long)
            if confusion.shape != (len(labels), len(labels)) or confusion.sum() < 1 or confusion.min() < 0:
                raise ValueError(f"{tuple(confusion.shape)}")
            return cls(
                labels, confusion, float(values["top5"]), values.get("flips"), dict(values.get("unreadable", {}))
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput("these are no results of an evaluation.") from error


def evaluate(classifier: Classifier, source: DataSource, other: Classifier | None = None) -> Evaluation:
    """Run a classifier on the test images of a data set, each prepared as in its training.

    Args:
        other: a classifier of the same classes; the images about which it decides otherwise are counted.

    Raises:
        InvalidInput: the data doesn't fit a classifier, or the two have different classes.
    """
    if other is not None and other.labels != classifier.labels:
        raise InvalidInput(f"{classifier.name!r} and {other.name!r} have different classes, so they can't be compared.")
    data = classifier.data(source)
    scores, truth = classifier.scores(data)
    found = Predictions.of(scores, truth)
    flips = None if other is None else found.flips(Predictions.of(*other.scores(other.data(source))))
    return Evaluation.of(classifier.labels, found, flips=flips, unreadable=data.unreadable)

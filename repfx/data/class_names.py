"""Class names: what the labels of a data set count, and images whose labels count the classes of a trained model instead."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from repfx.data.dataset import DataSet, Images, labels_of
from repfx.errors import InvalidInput

_SHOWN = 5


class RelabelledImages(Dataset[Any]):
    """Images whose labels are replaced.

    Args:
        images: pairs of an image and its label.
        places: the new label, by the old one.
    """

    def __init__(self, images: Images, places: Sequence[int]) -> None:
        self.images = images
        self.places = list(places)

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.images[index]
        return image, self.places[int(label)]

    @property
    def targets(self) -> Tensor:
        """All labels, `(images,)`."""
        return torch.tensor(self.places)[labels_of(self.images)]


def matched(data: DataSet, classes: Sequence[str], name: str) -> DataSet:
    """Return a data set whose labels count `classes`. Classes are matched by their names.

    Args:
        classes: names of the classes that a model was trained on. The data may lack some of them.
        name: name of the data, for the error.

    Raises:
        InvalidInput: the data has a class that the model wasn't trained on, or two classes have one name.

    >>> data = DataSet([("a cat", 0), ("a dog", 1)], [("a dog", 1)], ("cat", "dog"))
    >>> matched(data, ("bird", "cat", "dog"), "pets").test[0]
    ('a dog', 2)
    """
    if data.classes == tuple(classes):
        return data
    unknown = [each for each in data.classes if each not in set(classes)]
    twice = [each for names in (data.classes, classes) for each, count in Counter(names).items() if count > 1]
    if unknown or twice:
        reason = (
            f"of unknown names: {named_beside(unknown, classes)}" if unknown else f"that share a name: {_listed(twice)}"
        )
        raise InvalidInput(
            f"{name!r} has classes {reason}. The model was trained on {len(classes)} classes: {_listed(classes)}."
        )
    places = [list(classes).index(each) for each in data.classes]
    train, test = (RelabelledImages(part, places) for part in (data.train, data.test))
    return replace(data, train=train, test=test, classes=tuple(classes))


def require_same(data: DataSet, classes: Sequence[str], name: str, run: str) -> None:
    """Raise unless the labels of the data count the classes with which a run was begun.

    Raises:
        InvalidInput: a class is missing, new, or in another place.
    """
    if data.classes == tuple(classes):
        return
    missing, new = ([a for a in ours if a not in theirs] for ours, theirs in _both_ways(classes, data.classes))
    parts = [f"lacks {_listed(missing)}"] if missing else []
    parts += [f"has also {_listed(new)}"] if new else []
    found = " and ".join(parts) or "has them in another order"
    raise InvalidInput(
        f"the run in {run!r} was begun with {len(classes)} classes, and {name!r} now {found}: give the same data, or begin a new run."
    )


def _both_ways(a: Sequence[str], b: Sequence[str]) -> tuple[tuple[Sequence[str], set[str]], ...]:
    return (a, set(b)), (b, set(a))


def named_beside(names: Sequence[str], known: Sequence[str]) -> str:
    """List names of which none is known, the first ones with the known name that is nearest.

    >>> named_beside(["circel", "moon"], ["circle", "square"])
    'circel (circle?), moon'
    """
    near = [difflib.get_close_matches(name, known, n=1) for name in names[:_SHOWN]]
    return _listed([f"{name} ({found[0]}?)" if found else name for name, found in zip(names, near)] + [*names[_SHOWN:]])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

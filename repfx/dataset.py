"""What a data set is: where it comes from, the form its images take, and its training and test part."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from repfx.errors import InvalidInput
from repfx.meaning import is_conv

Images = Dataset[Any]


@dataclass(frozen=True)
class DataSource:
    """Where a data set comes from.

    Args:
        name: `digits`, a folder, an `.npz` file, or a torchvision data set's name.
        root: where a torchvision data set's files are.
        download: let torchvision download them if they aren't.
    """

    name: str = "digits"
    root: Path = Path("data")
    download: bool = False


@dataclass(frozen=True)
class InputForm:
    """What a model's first conv takes: its channels and axes, and the size of an image if one was asked for.

    >>> InputForm.of(nn.Sequential(nn.Conv2d(3, 8, 3)))
    InputForm(channels=3, dimensions=2, size=None)
    """

    channels: int
    dimensions: int = 2
    size: int | None = None

    @classmethod
    def of(cls, model: nn.Module, size: int | None = None) -> InputForm:
        """Read it off a model.

        Raises:
            InvalidInput: the model has no conv.
        """
        conv: Any = next((module for module in model.modules() if is_conv(module)), None)
        if conv is None:
            raise InvalidInput(f"{type(model).__name__} has no conv.")
        return cls(conv.in_channels, len(conv.kernel_size), size)


@dataclass(frozen=True)
class DataSet:
    """Images with labels from 0, split into training and test, each image `(channels, *axes)` in float32.

    Args:
        preparation: what was done to the raw values, for whoever runs the exported model.
    """

    train: Images
    test: Images
    classes: tuple[str, ...]
    preparation: dict[str, Any] = field(default_factory=dict)

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Of one image."""
        return tuple(self.test[0][0].shape)


def every_fifth(labels: Tensor) -> Tensor:
    """A mask that is True for every fifth entry of each class: the same split for everyone, always.

    >>> every_fifth(torch.tensor([0, 1, 1, 0, 1, 1, 1])).nonzero().flatten().tolist()
    [6]
    """
    return every(5, labels)


def every(number: int, labels: Tensor) -> Tensor:
    """A mask that is True for every so manyth entry of each class."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        chosen[(labels == label).nonzero().flatten()[number - 1 :: number]] = True
    return chosen

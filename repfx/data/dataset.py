"""What a data set is: where it comes from, the form its images take, and its training and test part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from repfx.algebra.layers import is_conv
from repfx.errors import InvalidInput

Images = Dataset[Any]


@dataclass(frozen=True)
class DataSource:
    """Where a data set comes from.

    Args:
        name: `digits`, a folder, an `.npz` file, or a torchvision data set's name.
        root: where a torchvision data set's files are.
        download: let torchvision download them if they aren't.
        crop: of image files, which part of height and width is shown, from the middle; 0.875 is 224 of 256 pixels. A random crop in
            training takes the whole image.
    """

    name: str = "digits"
    root: Path = Path("data")
    download: bool = False
    crop: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise InvalidInput(f"crop is {self.crop}; it must be more than 0 and at most 1.")


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


def as_it_is(image: Any) -> Any:
    """The image; a stage that has nothing to do."""
    return image


@dataclass(frozen=True)
class Stages:
    """How a raw image becomes what a model takes.

    Args:
        size: of an image, `(*axes,)`.
        fit: gives an image this size.
        normalize: turns that into a float tensor `(channels, *axes)`.
        convert: gives a raw image as many channels as the model takes, before all else.
    """

    size: tuple[int, ...]
    fit: Callable[[Any], Any]
    normalize: Callable[[Any], Tensor]
    convert: Callable[[Any], Any] = as_it_is

    def __call__(self, image: Any) -> Tensor:
        """All in turn."""
        return self.normalize(self.fit(self.convert(image)))


class PreparedImages(Dataset[Any]):
    """Raw images with labels, of which each is prepared when it is asked for.

    Args:
        raw: pairs of an image and its label.
    """

    def __init__(self, raw: Images, stages: Stages) -> None:
        self.raw = raw
        self.stages = stages

    def __len__(self) -> int:
        return len(self.raw)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.raw[index]
        return self.stages(image), label


def part_of(images: Images, indices: list[int]) -> Images:
    """Some of the images, still with their stages if they have any."""
    if isinstance(images, PreparedImages):
        return PreparedImages(Subset(images.raw, indices), images.stages)
    return Subset(images, indices)


def labels_of(images: Images) -> Tensor:
    """All labels, without a look at the images where that can be."""
    if isinstance(images, PreparedImages):
        return labels_of(images.raw)
    if isinstance(images, Subset):
        return labels_of(images.dataset)[list(images.indices)]
    if isinstance(images, TensorDataset):
        return images.tensors[1].long()
    known = getattr(images, "targets", None)
    labels = [images[index][1] for index in range(len(images))] if known is None else known  # type: ignore[arg-type]
    return torch.tensor([int(label) for label in labels], device="cpu")


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
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        chosen[(labels == label).nonzero().flatten()[number - 1 :: number]] = True
    return chosen

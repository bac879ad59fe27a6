"""Data sets: their source, the form that their images take, and their training and test parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from repfx.algebra.layers import is_conv
from repfx.errors import InvalidInput
from repfx.onnx.preprocessing import Preprocessing

Images = Dataset[Any]
MOST_CLASSES = 1 << 16  # more only if there are as many labels


@dataclass(frozen=True)
class DataSource:
    """The source of a data set.

    Args:
        name: `digits`, a folder, an `.npz` file, `hf:` and the name or the folder of a data set for Hugging Face's `datasets`, `wds:`
            and a folder of WebDataset's shards, or a torchvision data set's name.
        root: folder that holds a torchvision data set's files.
        download: whether torchvision or `datasets` downloads files that are missing.
        crop: part of the height and width of an image file that is shown, from the middle; 0.875 is 224 of 256 pixels. A random crop
            in training is taken from the whole image instead.
        strict: whether all image files are read before anything else, and one that can't be read is an error. Otherwise it is left out.
        options: options of the source; with `hf:` and `wds:`, those of `Options` in `repfx.data.hugging_face` and `repfx.data.web_dataset`.
    """

    name: str = "digits"
    root: Path = Path("data")
    download: bool = False
    crop: float = 1.0
    strict: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise InvalidInput(f"crop is {self.crop}; it must be more than 0 and at most 1.")


@dataclass(frozen=True)
class InputForm:
    """The form of a model's images: the channels and axes that its first conv takes, and the size if one was asked for.

    >>> InputForm.of(nn.Sequential(nn.Conv2d(3, 8, 3)))
    InputForm(channels=3, dimensions=2, size=None)
    """

    channels: int
    dimensions: int = 2
    size: int | None = None

    @classmethod
    def of(cls, model: nn.Module, size: int | None = None) -> InputForm:
        """Read the form from a model's first conv.

        Raises:
            InvalidInput: the model has no conv.
        """
        conv: Any = next((module for module in model.modules() if is_conv(module)), None)
        if conv is None:
            raise InvalidInput(
                f"{type(model).__name__} has no conv, and the first conv says which images a model takes: train it with your own loop."
            )
        return cls(conv.in_channels, len(conv.kernel_size), size)


def as_it_is(image: Any) -> Any:
    """Return the image unchanged, as a stage that has nothing to do."""
    return image


@dataclass(frozen=True)
class Stages:
    """Stages that turn a raw image into the input of a model.

    Args:
        size: size of an image, `(*axes,)`.
        fit: function that gives an image this size.
        normalize: function that turns the fitted image into a float tensor `(channels, *axes)`. If nothing is fitted, it takes
            `(images, channels, *axes)`, too.
        convert: function that gives a raw image the number of channels that the model takes, before the other stages.
    """

    size: tuple[int, ...]
    fit: Callable[[Any], Any]
    normalize: Callable[[Any], Tensor]
    convert: Callable[[Any], Any] = as_it_is

    def __call__(self, image: Any) -> Tensor:
        """Convert, fit and normalize a raw image."""
        return self.normalize(self.fit(self.convert(image)))


class PreparedImages(Dataset[Any]):
    """Raw images with labels. Each image is prepared when it is asked for.

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
    """Return some of the images, still with their stages if they have any."""
    if isinstance(images, PreparedImages):
        return PreparedImages(Subset(images.raw, indices), images.stages)
    return Subset(images, indices)


def labels_of(images: Images) -> Tensor:
    """Return all labels, without loading the images if that is possible."""
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
    """Images with labels from 0, in a training and a test part. Each image is `(channels, *axes)` in float32.

    Args:
        preprocessing: how the raw images are prepared, for those who run the exported model; None if that isn't known.
        unreadable: reasons why test images are left out, by path.
    """

    train: Images
    test: Images
    classes: tuple[str, ...]
    preprocessing: Preprocessing | None = None
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return tuple(self.test[0][0].shape)


def every_fifth(labels: Tensor) -> Tensor:
    """Return a mask that is True for every fifth entry of each class, so that everyone always gets the same split.

    >>> every_fifth(torch.tensor([0, 1, 1, 0, 1, 1, 1])).nonzero().flatten().tolist()
    [6]
    """
    return every(5, labels)


def every(number: int, labels: Tensor) -> Tensor:
    """Return a mask that is True for every `number`-th entry of each class."""
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        chosen[(labels == label).nonzero().flatten()[number - 1 :: number]] = True
    return chosen

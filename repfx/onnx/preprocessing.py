"""How a raw image becomes one input of a model, as a value: what training did is what a file says and what `predict` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from repfx.errors import InvalidInput
from repfx.records.plain_values import from_plain

_LARGEST = 1 << 20  # pixels along an axis of an image
_INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """How a raw image becomes one input of a model. A pixel p of a channel becomes ``(p / divisor - mean) / std``.

    Args:
        shape: shape of one input, `(channels, *axes)`. Three channels are red, green and blue, one is grey.
        mean: mean of each channel, after the division by `divisor`.
        std: deviation of each channel, after the division by `divisor`.
        divisor: 255 for pixels that are bytes, if `mean` and `std` are for pixels from 0 to 1.
        fit: ``"crop"`` resizes the shorter side to ``round(size / crop)`` with antialiasing, and takes the middle. ``"stretch"`` resizes
            each axis to its size, without antialiasing.
        crop: part of the resized image's height and width that is shown, with ``"crop"``.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        value_range: the least and the greatest value of a raw pixel.

    Raises:
        InvalidInput: a size isn't positive, or `mean` or `std` have other lengths than the channels.

    >>> Preprocessing((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 255, "crop", 0.875).resized
    256
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    divisor: float = 1.0
    fit: Literal["crop", "stretch"] = "stretch"
    crop: float = 1.0
    interpolation: str = "bilinear"
    value_range: tuple[float, ...] = (0.0, 255.0)

    def __post_init__(self) -> None:
        if not self.shape or not all(type(size) is int and 0 < size < _LARGEST for size in self.shape):
            raise InvalidInput(f"the shape of an image is {str(self.shape)[:80]}; it must be whole numbers from 1.")
        if not len(self.mean) == len(self.std) == self.shape[0]:
            raise InvalidInput(
                f"there are {len(self.mean)} means and {len(self.std)} deviations; the {self.shape[0]} channels need one each."
            )
        if not all(deviation > 0 for deviation in (*self.std, self.divisor)):
            raise InvalidInput("a deviation or the divisor isn't above 0.")
        if not 0 < self.crop <= 1:
            raise InvalidInput(f"crop is {self.crop}; it must be more than 0 and at most 1.")
        if self.interpolation not in _INTERPOLATIONS:
            raise InvalidInput(f"interpolation is {self.interpolation!r}; it must be {' or '.join(_INTERPOLATIONS)}.")
        if len(self.value_range) != 2 or not self.value_range[0] < self.value_range[1]:
            raise InvalidInput(f"value_range is {self.value_range}; it must be a least and a greater number.")
        if self.fit == "crop" and not self.is_square_picture:
            raise InvalidInput(f"fit is 'crop' and an image {self.shape}; a crop is as high as it is wide.")

    @property
    def is_square_picture(self) -> bool:
        """Whether an image has two axes of one size."""
        return len(self.shape) == 3 and self.shape[1] == self.shape[2]

    @property
    def resized(self) -> int:
        """The length of the shorter side before the middle is taken, with ``fit="crop"``."""
        return round(self.shape[-1] / self.crop)

    def require_range(self, low: float, high: float, name: str) -> None:
        """Raise if raw images have another range of values than those that the model was trained on.

        Raises:
            InvalidInput: one range is more than twice as wide as the other.
        """
        known = self.value_range[1] - self.value_range[0]
        if not known / 2 <= high - low <= known * 2:
            raise InvalidInput(
                f"the model was trained on images whose pixels go from {self.value_range[0]:g} to {self.value_range[1]:g}; those of "
                f"{name!r} go from {low:g} to {high:g}: scale them to the same range."
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Read what `as_dict` returned.

        Raises:
            InvalidInput: the values are others.
        """
        return from_plain(cls, values, "preprocessing")

    def normalized(self, image: Tensor) -> Tensor:
        """Return `(…, channels, *axes)` of the right size as float32, normalized."""
        mean, std = self._moments
        return (image.float() / self.divisor - mean) / std

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation as tensors that broadcast against an image; made once, not for each image."""
        shape = (-1, *[1] * (len(self.shape) - 1))
        mean, std = (torch.tensor(values, dtype=torch.float32).view(shape) for values in (self.mean, self.std))
        return mean, std

    def fitted(self, image: Tensor) -> Tensor:
        """Resize `(channels, *axes)` to the shape of an input, and take the middle if that is the rule."""
        if self.fit == "stretch":
            return stretched(image[None], self.shape[1:], self.interpolation)[0]
        height, width = image.shape[1:]
        shorter = min(height, width)
        sizes = (height * self.resized // shorter, width * self.resized // shorter)
        x = image[None].float()
        if sizes != (height, width):
            x = F.interpolate(x, sizes, mode=self.interpolation, align_corners=False, antialias=True)
        top, left = (round((size - self.shape[-1]) / 2) for size in sizes)
        return x[0, :, top : top + self.shape[1], left : left + self.shape[2]].round().clamp(0, 255)

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare a batch of pictures.

        Args:
            images: `(images, height, width, channels)` in uint8.

        Returns:
            `(images, channels, *axes)` in float32.
        """
        return torch.stack([self.normalized(self.fitted(image)) for image in images.movedim(-1, 1)])


def stretched(x: Tensor, sizes: tuple[int, ...], interpolation: str = "bilinear") -> Tensor:
    """Resize each axis of images `(images, channels, *axes)` to its size, without antialiasing. Images of that size stay as they are."""
    if tuple(x.shape[2:]) == tuple(sizes):
        return x
    mode = interpolation if len(sizes) == 2 else {1: "linear", 3: "trilinear"}[len(sizes)]
    return F.interpolate(x.float(), sizes, mode=mode, align_corners=False)

"""Vary training images by the transforms of torchvision (v2), as `Augmentation` says.

The random numbers for an image depend only on the seed, the epoch and the image. So neither the number of processes that load images nor an
interruption changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from repfx.data.crop_and_flip import CropAndFlip
from repfx.data.dataset import Images, PreparedImages, Stages, as_it_is
from repfx.data.seeds import seed_of
from repfx.errors import InvalidInput, UnknownName

_POLICIES = {"imagenet": "AutoAugment", "cifar10": "AutoAugment", "svhn": "AutoAugment"}
_POLICIES |= {"rand": "RandAugment", "trivial": "TrivialAugmentWide", "augmix": "AugMix"}


@dataclass(frozen=True)
class Augmentation:
    """Changes to training images, in the order of these arguments; by default none.

    Args:
        crop_padding: number of black pixels added at each side of an image, from which a crop of the old size is then taken.
        resized_crop: smallest part of the image's area that a random crop shows before it is resized; 0 takes the whole image. It
            excludes `crop_padding`.
        flip: probability of a left–right flip.
        auto_augment: name of a policy: imagenet, cifar10, svhn (AutoAugment), rand, trivial or augmix.
        color_jitter: largest relative change of brightness, contrast and saturation.
        random_erasing: probability that a rectangle is set to the mean.
        cutout: side of a square, in pixels, that is set to the mean in each image.
        mixup: α of mixup over a batch; 0 for none.
        cutmix: α of CutMix over a batch; 0 for none. If mixup is on, too, each batch gets one of the two.
    """

    crop_padding: int = 0
    resized_crop: float = 0.0
    flip: float = 0.0
    auto_augment: str = ""
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop_padding", "color_jitter", "cutout", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}; it must be at least 0.")
        for name in ("resized_crop", "flip", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}; it must be from 0 to 1.")
        if self.crop_padding and self.resized_crop:
            raise InvalidInput("crop_padding and resized_crop are two ways to crop: set one of them.")
        if self.auto_augment and self.auto_augment not in _POLICIES:
            raise UnknownName("policy of auto_augment", self.auto_augment, _POLICIES)

    @property
    def per_image(self) -> bool:
        """Whether single images are changed."""
        return self != Augmentation(mixup=self.mixup, cutmix=self.cutmix)

    def of_images(self, images: Images, seed: int) -> Images:
        """Wrap the images so that each is varied when it is asked for. Return them as they are if no single images are changed.

        Raises:
            InvalidInput: the images are no raw pictures with two axes.
        """
        if not self.per_image:
            return images
        if not isinstance(images, PreparedImages) or len(images.stages.size) != 2:
            raise InvalidInput(
                "only images that are pictures, with two axes, can be augmented: leave augmentation out."
            )
        if (self.auto_augment or self.color_jitter) and getattr(images.raw[0][0], "dtype", torch.uint8) != torch.uint8:
            name = "auto_augment" if self.auto_augment else "color_jitter"
            raise InvalidInput(
                f"{name} needs pictures of bytes, and these hold floats; resizing, too, turns bytes into floats."
            )
        return AugmentedImages(images.raw, self._transform(images), seed, self._at_once(images.stages))

    def _at_once(self, stages: Stages) -> Callable[[Tensor, Sequence[int]], Tensor] | None:
        """Return a function that varies many images in memory at once, if they need no other changes than crops and flips."""
        if self != Augmentation(crop_padding=self.crop_padding, flip=self.flip, mixup=self.mixup, cutmix=self.cutmix):
            return None
        if not stages.convert is stages.fit is as_it_is:
            return None
        vary = CropAndFlip(self.crop_padding, self.flip)
        return lambda images, seeds: stages.normalize(vary(images, seeds))

    def of_batch(self, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return a function that mixes the images of a batch. Mixing turns the labels into `(images, classes)`."""
        from torchvision.transforms import v2

        mixes = [
            kind(alpha=alpha, num_classes=classes)
            for kind, alpha in ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix))
            if alpha
        ]
        return v2.RandomChoice(mixes) if mixes else lambda x, y: (x, y)

    def _transform(self, images: PreparedImages) -> Callable[[Any], Tensor]:
        from torchvision.transforms import v2

        stages, size = images.stages, images.stages.size
        steps: list[Callable[[Any], Any]] = [stages.convert]
        if self.resized_crop:
            steps += [v2.RandomResizedCrop(size, (self.resized_crop, 1.0))]
        else:
            steps += [stages.fit]
        if self.crop_padding:
            steps += [v2.RandomCrop(size, self.crop_padding)]
        if self.flip:
            steps += [v2.RandomHorizontalFlip(self.flip)]
        if self.auto_augment:
            steps += [_policy(self.auto_augment)]
        if self.color_jitter:
            steps += [v2.ColorJitter(*[self.color_jitter] * 3)]
        steps += [stages.normalize]
        if self.random_erasing:
            steps += [v2.RandomErasing(self.random_erasing)]
        if self.cutout:
            steps += [Cutout(self.cutout)]
        every: Callable[[Any], Tensor] = v2.Compose(steps)
        return every


class AugmentedImages(Dataset[Any]):
    """Raw images with labels, varied anew in each `epoch`.

    Args:
        transform: function that varies one image.
        at_once: function of many images and their seeds that gives the same, or None.
    """

    def __init__(
        self,
        raw: Images,
        transform: Callable[[Any], Tensor],
        seed: int,
        at_once: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
    ) -> None:
        self.raw = raw
        self.transform = transform
        self.seed = seed
        self.at_once = at_once
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.raw)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.raw[index]
        elsewhere = torch.get_default_device().type != "cpu"  # another device would draw other numbers
        with torch.random.fork_rng(devices=[]), torch.device("cpu") if elsewhere else nullcontext():
            torch.default_generator.manual_seed(self._seed_of(index))
            return self.transform(image), label

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Any]]:
        """Return several images with their labels, as a `DataLoader` asks for a batch."""
        if self.at_once is None:
            return [self[index] for index in indices]
        images, labels = zip(*(self.raw[index] for index in indices))
        return list(zip(self.at_once(torch.stack(images), [*map(self._seed_of, indices)]), labels))

    def _seed_of(self, index: int) -> int:
        return seed_of(self.seed, self.epoch, index)


@dataclass(frozen=True)
class Cutout:
    """Set a square to 0. Its centre is anywhere in the image, so the square may lie partly outside (DeVries & Taylor, 2017).

    >>> Cutout(4)(torch.ones(3, 8, 6)).sum(0).min().item()
    0.0
    """

    side: int

    def __call__(self, image: Tensor) -> Tensor:
        """Return the image, `(channels, height, width)`, with a hole."""
        height, width = image.shape[-2:]
        top = int(torch.randint(height, ())) - self.side // 2
        left = int(torch.randint(width, ())) - self.side // 2
        rows = torch.arange(height, device=image.device)[:, None]
        columns = torch.arange(width, device=image.device)
        hole = (rows >= top) & (rows < top + self.side) & (columns >= left) & (columns < left + self.side)
        return image.masked_fill(hole, 0)


def _policy(name: str) -> Any:
    from torchvision.transforms import v2

    kind = getattr(v2, _POLICIES[name])
    return kind(v2.AutoAugmentPolicy(name)) if _POLICIES[name] == "AutoAugment" else kind()

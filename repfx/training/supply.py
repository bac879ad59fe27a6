"""`Supply`: the batches that one process trains on, epoch by epoch."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from repfx.data.augmentation import AugmentedImages
from repfx.data.batches import Batches
from repfx.data.dataset import Images
from repfx.data.reading import encoded_in
from repfx.training.process import Place
from repfx.training.recipe import Recipe


class Supply:
    """The batches of one process, augmented as the recipe says. Iteration yields the batches of `epoch`, the one that comes next."""

    def __init__(self, images: Images, recipe: Recipe, place: Place) -> None:
        self.images = recipe.augmentation.of_images(images, recipe.seed)
        self.recipe = recipe
        self.place = place
        self.epoch = 0
        self.steps = self._batches(0, 0).steps
        self._pinned = place.device.type == "cuda" and self.images[0][0].device.type == "cpu"

    def loader(self, epoch: int, begin: int = 0) -> DataLoader[Any]:
        """Return a loader of the batches of an epoch, from the step `begin` on."""
        if isinstance(self.images, AugmentedImages):
            self.images.epoch = epoch
        return DataLoader(
            self.images,
            batch_sampler=self._batches(epoch, begin),
            num_workers=self.recipe.workers,
            worker_init_fn=_leave_interrupts_to_the_parent,
            pin_memory=self._pinned,
        )

    def to_score(self, images: Images) -> DataLoader[Any]:
        """Return a loader of images as they are, which may be gone through once for each candidate of a search."""
        workers = self.recipe.workers
        return DataLoader(
            images, self.recipe.batch_size, num_workers=workers, worker_init_fn=_leave_interrupts_to_the_parent
        )

    @property
    def unreadable(self) -> list[str]:
        """The paths of the image files that this process was to read so far and couldn't."""
        images = encoded_in(self.images)
        return [] if images is None else images.unreadable

    def reasons_for(self, paths: list[str]) -> dict[str, str]:
        """Return the reason why each of some images can't be read, by the paths that `unreadable` gives."""
        images = encoded_in(self.images)
        return {} if images is None else images.reasons_for(paths)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader(self.epoch))

    def _batches(self, epoch: int, begin: int) -> Batches:
        count = len(self.images)  # type: ignore[arg-type]
        process, processes = self.place.process, self.place.processes
        return Batches(count, self.recipe.batch_size, self.recipe.seed, epoch, process, processes, begin)


def _leave_interrupts_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

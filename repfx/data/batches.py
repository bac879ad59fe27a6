"""The images of each step of an epoch, in an order that depends only on the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from repfx.data.seeds import seed_of
from repfx.errors import InvalidInput


@dataclass(frozen=True)
class Batches(Sampler[list[int]]):
    """The batches of one process in one epoch, for a `DataLoader`'s `batch_sampler`.

    The images left at the end of an epoch make a smaller batch. It is left out if some process would get fewer than two images, because
    BatchNorm can't train with fewer.

    Args:
        images: number of images.
        size: number of images in a batch, over all processes together.
        seed, epoch: numbers that decide the order.
        process, processes: index of this process, and number of processes.
        begin: step to begin with.

    Raises:
        InvalidInput: the processes can't share the batch evenly, or there are too few images.

    >>> [len(batch) for batch in Batches(images=33, size=8)], [len(batch) for batch in Batches(images=14, size=8, process=1, processes=2)]
    ([8, 8, 8, 8], [4, 3])
    """

    images: int
    size: int
    seed: int = 0
    epoch: int = 0
    process: int = 0
    processes: int = 1
    begin: int = 0

    def __post_init__(self) -> None:
        if self.size % self.processes or self.size < 2 * self.processes:
            needed = f"it must be a multiple of the {self.processes} processes, and at least twice that number"
            raise InvalidInput(f"batch_size is {self.size}; {needed}.")
        if self.images < 2 * self.processes:
            raise InvalidInput(
                f"there are {self.images} images to train on; BatchNorm needs at least 2 for each process."
            )

    @property
    def steps(self) -> int:
        """The number of steps in a whole epoch."""
        whole, rest = divmod(self.images, self.size)
        return whole + (rest >= 2 * self.processes)

    def __len__(self) -> int:
        return self.steps - self.begin

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator, device="cpu")
        for step in range(self.begin, self.steps):
            batch = order[step * self.size : (step + 1) * self.size]
            even = len(batch) - len(batch) % self.processes
            yield batch[self.process : even : self.processes].tolist()

"""The inputs that a Trainer trains on, for the statistics of new BatchNorms."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

from repfx.errors import InvalidInput


class TrainingData:
    """A Trainer's training batches, as its model gets them. Each iteration loads them anew, apart from the Trainer's own iteration."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        trainer = self._trainer
        loader, count = trainer.train_dataloader, trainer.num_training_batches
        if isinstance(loader, (dict, list, tuple)):
            raise InvalidInput(
                f"there are {len(loader)} training data loaders, but new BatchNorms are measured on one: give `calibrate`."
            )
        for batch in islice(_apart(loader), None if math.isinf(count) else int(count)):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = trainer.lightning_module._on_before_batch_transfer(batch)
            yield trainer.strategy.batch_to_device(batch)


def _apart(loader: Any) -> Any:
    """Return the loader; if it has persistent workers, a copy with workers of its own, because training still uses the others."""
    if getattr(loader, "persistent_workers", False):
        loader = copy.copy(loader)
        loader._iterator = None
    return loader

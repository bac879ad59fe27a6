"""The inputs that a Trainer trains on, for statistics."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

from repfx.errors import InvalidInput


class TrainingData:
    """A Trainer's training batches, as its model gets them; each time anew, apart from those that it trains on."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        trainer = self._trainer
        loader, count = trainer.train_dataloader, trainer.num_training_batches
        if isinstance(loader, (dict, list, tuple)):
            raise InvalidInput(
                f"there are {len(loader)} training data loaders, and new BatchNorms are measured on one: give `calibrate`."
            )
        for batch in islice(_apart(loader), None if math.isinf(count) else int(count)):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = trainer.lightning_module._on_before_batch_transfer(batch)
            yield trainer.strategy.batch_to_device(batch)


def _apart(loader: Any) -> Any:
    """A loader whose persistent workers aren't those that training goes on with."""
    if getattr(loader, "persistent_workers", False):
        loader = copy.copy(loader)
        loader._iterator = None
    return loader

"""`History`: what a training run was like, epoch by epoch, as plain values that stand in `history.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repfx.errors import InvalidInput
from repfx.journaling import ACTIONS, Action

_FORMAT = 1


@dataclass(frozen=True)
class Epoch:
    """One epoch; number 0 is the state before the training.

    Args:
        epoch: its number.
        loss: mean over the steps of the training; None in epoch 0.
        accuracy: fraction of the test images that is right, in eval mode; None where it wasn't measured.
        ema_accuracy: that of the averaged model, if there is one.
        learning_rate: of the last step.
        seconds: that the epoch took, tests included.
        parameters, macs: of the form that was trained; multiply-adds of one image, forward. In epoch 0, of the plain model.
        actions: what was done to the structure at the end of the epoch; in epoch 0, before the training.
        blocks: by site, mean |γ| of the last BatchNorm of its own conv (``origin``) and of each branch, None where there is no γ; before
            the actions of this epoch, but in epoch 0 after them.
    """

    epoch: int
    loss: float | None
    accuracy: float | None
    ema_accuracy: float | None
    learning_rate: float | None
    seconds: float | None
    parameters: int
    macs: int
    actions: tuple[Action, ...] = ()
    blocks: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        blocks = {site: dict(scales) for site, scales in self.blocks.items()}
        return values | {"actions": [action.to_dict() for action in self.actions], "blocks": blocks}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Epoch:
        """The reverse of `to_dict`."""
        entries = [dict(entry) for entry in values["actions"]]
        actions = tuple(ACTIONS[entry.pop("action")].from_dict(entry) for entry in entries)
        return cls(**{**values, "actions": actions})


@dataclass(frozen=True)
class History:
    """All epochs of a run so far, from number 0.

    >>> history = History((Epoch(0, None, None, None, None, None, 10, 20),))
    >>> History.from_json(history.to_json(), Path("history.json")) == history
    True
    """

    epochs: tuple[Epoch, ...] = ()

    def to_json(self) -> str:
        """As text, a line for each epoch."""
        lines = ",\n".join(json.dumps(epoch.to_dict()) for epoch in self.epochs)
        return f'{{"format": {_FORMAT}, "epochs": [\n{lines}\n]}}\n'

    @classmethod
    def from_json(cls, text: str, path: Path) -> History:
        """Read what `to_json` wrote; `path` is named in errors.

        Raises:
            InvalidInput: it is something else.
        """
        try:
            found = json.loads(text)
            version = found["format"]
            epochs = tuple(map(Epoch.from_dict, found["epochs"])) if version == _FORMAT else ()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{str(path)!r} is no history that `repfx train` wrote.") from error
        if version != _FORMAT:
            raise InvalidInput(f"{str(path)!r} has format {version}; this version of repfx reads {_FORMAT}.")
        return cls(epochs)

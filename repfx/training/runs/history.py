"""`History`: how a training run went, epoch by epoch; the contents of `history.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from repfx.errors import InvalidInput, RepfxError
from repfx.records.journal import Action, from_json
from repfx.records.json_text import parse_json

_FORMAT = 1
_NUMBERS = ("epoch", "loss", "accuracy", "ema_accuracy", "learning_rate", "seconds", "parameters", "macs")
_None = type(None)


@dataclass(frozen=True)
class Epoch:
    """One epoch of a run.

    Args:
        epoch: number of the epoch, counted from 1; 0 for the state before training.
        loss: mean loss over the training steps; None for epoch 0.
        accuracy: accuracy on the test images in eval mode, from 0 to 1; None if it wasn't measured.
        ema_accuracy: accuracy of the averaged model, measured like `accuracy`; None, too, if there is no average.
        learning_rate: learning rate of the last step; None for epoch 0.
        seconds: duration of the epoch; None for epoch 0.
        parameters, macs: size and cost of this epoch's training form, MACs for one image forward; in epoch 0, of the plain model.
        actions: changes made at the end of this epoch; in epoch 0, before training.
        blocks: mean |γ| by site path: of the BatchNorm of the site's own conv as ``origin``, and of the last BatchNorm of each branch.
            None where there is no γ. Measured at the end of the epoch and before its actions; in epoch 0, after them.
        gradients: mean |gradient| over the epoch's steps by site path, of the weights of each path that ran. Empty unless the recipe asks.
    """

    epoch: int
    loss: float | None = None
    accuracy: float | None = None
    ema_accuracy: float | None = None
    learning_rate: float | None = None
    seconds: float | None = None
    parameters: int = 0
    macs: int = 0
    actions: tuple[Action, ...] = ()
    blocks: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    gradients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the epoch as plain values, for JSON."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        blocks = {site: dict(gammas) for site, gammas in self.blocks.items()}
        found = {**own, "actions": [action.to_dict() for action in self.actions], "blocks": blocks}
        found["gradients"] = {site: dict(means) for site, means in self.gradients.items()}
        return found if self.gradients else {key: value for key, value in found.items() if key != "gradients"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Epoch:
        """Return the epoch whose plain values `to_dict` returned."""
        found = cls(**{**values, "actions": from_json(json.dumps(values.get("actions", [])))})
        numbers = [getattr(found, name) for name in _NUMBERS]
        numbers += [
            number for sites in (found.blocks, found.gradients) for own in sites.values() for number in own.values()
        ]
        if found.epoch is None or any(isinstance(x, bool) or not isinstance(x, (int, float, _None)) for x in numbers):
            raise InvalidInput(f"epoch {found.epoch!r} has something else where a number has to be.")
        return found


@dataclass(frozen=True)
class History:
    """The epochs of a run so far, beginning with epoch 0.

    >>> history = History((Epoch(0, parameters=9, macs=90), Epoch(1, loss=0.5, parameters=9, macs=90)))
    >>> History.from_json(history.to_json()) == history
    True
    """

    epochs: tuple[Epoch, ...]

    def to_json(self) -> str:
        """Return the history as JSON text."""
        return json.dumps({"format": _FORMAT, "epochs": [epoch.to_dict() for epoch in self.epochs]})

    @classmethod
    def from_json(cls, text: str, path: Path | None = None) -> History:
        """Read what `to_json` wrote. Errors name `path`.

        Raises:
            InvalidInput: the text is something else.
        """
        where = "this" if path is None else repr(str(path))
        try:
            found = parse_json(text)
            if found["format"] != _FORMAT:
                raise InvalidInput(f"it has format {found['format']}, and this version of repfx reads {_FORMAT}.")
            return cls(tuple(Epoch.from_dict(values) for values in found["epochs"]))
        except RepfxError as error:
            raise InvalidInput(f"{where} is no history of a run: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{where} is no history that `repfx train` wrote.") from error

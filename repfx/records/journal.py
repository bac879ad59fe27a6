"""`Action`, one change of a model's structure, and the journal: the actions that were applied to a model, in order.

A base model and a journal make the same structure again, so a checkpoint needs no pickled code. Each pass that changes a model in place
defines its action beside it and records it. The verbs that return a new model give it an empty journal, because it is a base of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, ClassVar

from torch import nn

from repfx.errors import InvalidInput, first_line
from repfx.records.generators import random_state_kept
from repfx.records.json_text import parse_json
from repfx.records.notes import keep, kept
from repfx.records.plain_values import from_plain

ACTIONS: dict[str, type[Action]] = {}
_ATTRIBUTE = "repfx_journal"
_REBUILT = "repfx_rebuilt"


@dataclass(frozen=True)
class Action:
    """One change of a model's structure. A subclass is a frozen dataclass of plain values that names its `kind`.

    Args:
        site: path of the conv or block that is changed.
    """

    kind: ClassVar[str]
    site: str

    @property
    def moves_kernels(self) -> bool:
        """Whether the action changes how the site's function is divided among its conv, its BatchNorm and its branches."""
        return True

    @property
    def changes_function(self) -> bool:
        """Whether the model computes something else afterwards, in eval mode."""
        return False

    def __init_subclass__(cls) -> None:
        ACTIONS[cls.kind] = cls

    def do(self, model: nn.Module) -> None:
        """Make this one change in place, without data. A kind whose changes are made together overrides `apply` instead."""
        raise NotImplementedError

    @classmethod
    def apply(cls, model: nn.Module, actions: Sequence[Any], calibrate: Iterable[Any] | None) -> None:
        """Make these changes of one kind in place, one after another, and record each.

        Args:
            calibrate: inputs of the model, which may be gone through more than once; without any, nothing is measured.
        """
        for action in actions:
            action.do(model)
            record(model, [action])

    @classmethod
    def replay(cls, model: nn.Module, actions: Sequence[Any]) -> None:
        """Make these changes without data. Eval mode computes what it did; what new tensors hold is left to a checkpoint."""
        cls.apply(model, actions, None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"action": self.kind, **{field.name: getattr(self, field.name) for field in fields(self)}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Action:
        """Make an action from the values that `to_dict` returned, and check their types."""
        try:
            return from_plain(cls, values)
        except NameError:  # the annotations of a class inside a function can't be read
            return cls(**values)


def journal(model: nn.Module) -> tuple[Action, ...]:
    """Return the actions on the structure of a model since it was built, fused or restored, in order.

    >>> import repfx
    >>> model = repfx.expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb")
    >>> repfx.drop(model, "0", "1xk") is model
    True
    >>> [action.kind for action in repfx.journal(model)]
    ['expand', 'drop']
    """
    found = kept(model, _ATTRIBUTE)
    return found if isinstance(found, tuple) else ()


def record(model: nn.Module, actions: Iterable[Action]) -> None:
    """Add actions to the journal of a model."""
    keep(model, _ATTRIBUTE, (*journal(model), *actions))


def forget(model: nn.Module) -> None:
    """Empty the journal of a model, so that the model as it is now is a base."""
    if journal(model):
        keep(model, _ATTRIBUTE, ())
    for module in model.modules():
        if kept(module, _REBUILT) is not None:
            keep(module, _REBUILT, None)


def mark_as_rebuilt(module: nn.Module) -> None:
    """Note that a module was fused by a method of its own. The journal of a model that holds it doesn't tell of this."""
    keep(module, _REBUILT, True)


def is_rebuilt(model: nn.Module) -> bool:
    """Whether a module in a model was fused by a method of its own since the model was a base."""
    return any(kept(module, _REBUILT) for module in model.modules())


def require_told(model: nn.Module) -> None:
    """Raise `InvalidInput` unless the journal of a model tells all that was done to its blocks."""
    path = next((path for path, module in model.named_modules() if kept(module, _REBUILT)), None)
    if path is not None:
        raise InvalidInput(
            f"{path or type(model).__name__!r} was fused by its own method (fuse, reparameterize or switch_to_deploy), which the journal "
            f"doesn't tell, so its structure can't be changed further, or saved with its history. Take repfx.fuse(model), which has no "
            "history, or the model before it was fused."
        )


def apply(model: nn.Module, actions: Iterable[Action], calibrate: Iterable[Any] | None) -> None:
    """Make changes in place, one after another.

    Raises:
        RepfxError: an action doesn't fit the model. The actions of other kinds before it have been applied and recorded.
    """
    require_told(model)
    for kind, group in groupby(actions, lambda action: action.kind):
        ACTIONS[kind].apply(model, list(group), calibrate)


def replay(model: nn.Module, actions: Iterable[Action]) -> None:
    """Give a base model the structure that a journal describes, in place. The values of new tensors are left to a checkpoint.

    Random numbers go on afterwards as if nothing had been drawn for these values.

    Raises:
        RepfxError: an action doesn't fit the model.
    """
    done, actions = journal(model), tuple(actions)
    with random_state_kept(model):
        for kind, group in groupby(actions, lambda action: action.kind):
            ACTIONS[kind].replay(model, list(group))
    keep(model, _ATTRIBUTE, (*done, *actions))  # in the given order, even where a kind made several changes at once


def to_json(actions: Iterable[Action]) -> str:
    """Return a journal as text."""
    return json.dumps([action.to_dict() for action in actions])


def from_json(text: str) -> tuple[Action, ...]:
    """Read a journal from the text that `to_json` returned.

    Raises:
        InvalidInput: the text is no journal, or it has an action or a field that this version doesn't know.
    """
    try:
        entries = parse_json(text)
        unknown = sorted({entry["action"] for entry in entries} - ACTIONS.keys())
        if unknown:
            raise InvalidInput(
                f"the journal has actions that this version of repfx doesn't know: {', '.join(unknown)}."
            )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInput(f"this is no journal: {text[:80]!r}.") from error
    try:
        return tuple(ACTIONS[entry.pop("action")].from_dict(entry) for entry in entries)
    except (InvalidInput, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInput(
            f"this version of repfx can't read the journal {text[:80]!r}: {first_line(error)}."
        ) from error

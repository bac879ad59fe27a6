"""The structure of a LightningModule in a Lightning checkpoint: how it is written, read and rebuilt."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from repfx.change.structure import Skeleton, Structure
from repfx.change.undo import as_before_on_error
from repfx.errors import InvalidInput
from repfx.records.journal import Action, journal, replay
from repfx.records.pickled_file import load_pickled

KEY = "repfx"
_FORMAT = 1


def rebuild(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a LightningModule the structure that the weights of a checkpoint have, in place. `RepFXCallback` does so by itself.

    Call it in ``on_load_checkpoint``, so that ``load_from_checkpoint`` works, too.

    Args:
        module: the LightningModule as it is made, or in any structure that the saved one has gone through.
        checkpoint: checkpoint of a LightningModule of the same class.

    Raises:
        InvalidInput: the module has been through other changes than the saved one.
    """
    entry = entry_in(checkpoint)
    Structure(entry.get("journals", {}), entry.get("folded", {})).rebuild(module)


def load_weights(path: str | os.PathLike[str], module: nn.Module) -> nn.Module:
    """Give a LightningModule the structure and the weights of a checkpoint, in place, without unpickling code and without a Trainer.

    Args:
        path: path of a checkpoint that a Trainer with a `RepFXCallback` wrote. With `WeightAveraging`, its weights are the averages.
        module: the LightningModule as it is made, or in any structure that the saved one has gone through.

    Returns:
        The module. The net in it is ready for `repfx.fuse` and `repfx.export_onnx`.

    Raises:
        InvalidInput: the file is no checkpoint, or it doesn't fit the module, which is then unchanged.
        OSError: the file can't be read.
    """
    checkpoint = load_pickled(path)
    with as_before_on_error([module]):
        try:
            rebuild(module, checkpoint)
            module.load_state_dict(checkpoint["state_dict"])
        except Exception as error:
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise InvalidInput(f"{os.fspath(path)!r} doesn't fit the {type(module).__name__}: {reason}.") from error
    return module


def entry_of(module: nn.Module) -> dict[str, Any]:
    """Return the entry of a checkpoint that describes the structure of its weights."""
    structure = Structure.of(module)
    return {"format": _FORMAT, "journals": dict(structure.journals), "folded": dict(structure.folded)}


def write_structure(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Add the structure of a module to a checkpoint, unless it holds a structure already."""
    checkpoint.setdefault(KEY, entry_of(module))


def entry_in(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the entry of a checkpoint about its structure; empty if repfx had no part in the checkpoint."""
    entry: Mapping[str, Any] = checkpoint.get(KEY, {})
    if entry and entry["format"] != _FORMAT:
        raise InvalidInput(f"the checkpoint has format {entry['format']}; this version of repfx reads {_FORMAT}.")
    return entry


def take_to(model: nn.Module, wanted: tuple[Action, ...], skeleton: Skeleton) -> None:
    """Give a model the structure that the journal `wanted` leads to, by way of `skeleton` if the model has been through other changes."""
    done = journal(model)
    if wanted[: len(done)] != done:
        skeleton.take_back(model)
        done = skeleton.journal
    if wanted[: len(done)] != done:
        raise InvalidInput(
            "before its training began, the model was changed in other ways than the saved one: make the LightningModule anew."
        )
    replay(model, wanted[len(done) :])

"""Checkpoints: one safetensors file with the weights of a run and, as JSON in its header, the history of its structure.

A model is built again from its class and its journal, so nothing is unpickled. The whole file is checked before any of it is used.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from repfx.change.driver import Driver
from repfx.change.optimizer_state import is_alike, load_by_name, state_by_name
from repfx.change.structure import Structure
from repfx.change.undo import as_before_on_error
from repfx.errors import InvalidInput, first_line
from repfx.records.generators import read_random_state, set_random_state
from repfx.records.json_text import parse_json, require_shallow
from repfx.records.module_tree import require_sizes
from repfx.records.nested_state import put_together, take_apart
from repfx.records.notes import copy_without_numbers
from repfx.records.target_file import staged
from repfx.records.wrappers import bare

Part: TypeAlias = Any  # a module, an optimizer, a generator, a dict, or anything with state_dict and load_state_dict

_FORMAT = 1
_HEAD = "repfx"
_MODEL, _OPTIMIZER, _DRIVER, _RANDOM = "model", "optimizer", "driver", "random_state"
_FOLDED = "folded"


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    driver: Driver | None = None,
    *,
    random_state: bool = True,
    **parts: Part,
) -> None:
    """Write a run to a file. A run resumed from it by `load` is bit for bit the run that was never interrupted.

    The file is a safetensors file. It holds the weights, the journal of the model's structure, the optimizer's state by parameter
    names, the state of `parts`, and the state of Python's and torch's random numbers. The file appears whole or not at all.

    Args:
        path: name of the file, in a folder that exists. A file of that name is replaced in one step.
        model: the model, in its present structure.
        optimizer: the optimizer of the model's parameters.
        driver: the driver of the model; the averaged model that it knows is written, too.
        random_state: whether the state of Python's and torch's random numbers is written, too.
        parts: whatever else belongs to the run, by names of your choice: further optimizers of the model, schedulers, a `GradScaler`, an
            `AveragedModel`, a `torch.Generator`, anything with `state_dict` and `load_state_dict`, or a dict of plain values.

    Raises:
        InvalidInput: the path can't be written, or something in the state can't be saved without pickling.

    >>> from tempfile import TemporaryDirectory
    >>> import repfx
    >>> model = repfx.expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb")
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    >>> with TemporaryDirectory() as folder:
    ...     repfx.save(f"{folder}/run.ckpt", model, optimizer, progress={"epoch": 3})
    ...     again = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    ...     progress = {"epoch": 0}
    ...     again = repfx.load(f"{folder}/run.ckpt", again, progress=progress)
    >>> list(again[0].branches), progress
    (['1xk', 'kx1'], {'epoch': 3})
    """
    model, parts = bare(model), _all_parts(driver, parts)
    require_sizes(model)
    save_file = _package("safetensors.torch").save_file
    tensors: dict[str, Tensor] = {}
    optimizers = _optimizers(optimizer, parts)
    states: dict[str, Any] = {_MODEL: model.state_dict()}
    states |= {name: _state_of(part) for name, part in parts.items() if name not in optimizers}
    states |= {name: state_by_name(each, model) for name, each in optimizers.items()}
    if random_state:
        states[_RANDOM] = read_random_state()
    try:
        written = {name: take_apart(state, name, tensors) for name, state in states.items()}
        require_shallow(written)
    except (RecursionError, ValueError) as error:
        raise InvalidInput("a part of the run is nested too deep to be saved: use flatter dicts and lists.") from error
    modules = _modules(model, parts)
    structures = {name: Structure.of(part) for name, part in modules.items()}
    journals = {name: each.journals for name, each in structures.items()}
    folded = {name: take_apart(each.folded, f"{_FOLDED}.{name}", tensors) for name, each in structures.items()}
    head = {"format": _FORMAT, "journals": journals, "states": written, _FOLDED: folded}
    text = json.dumps({**head, "checksum": _checksum(head, tensors)})
    with staged(path) as (_, staging):
        save_file(tensors, staging, metadata={_HEAD: text})


@torch.inference_mode(False)
def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    driver: Driver | None = None,
    *,
    random_state: bool = True,
    **parts: Part,
) -> nn.Module:
    """Bring a model, its optimizer and all other parts of a run to the state that `save` wrote, in place.

    Everything is read and checked first: if anything doesn't fit, nothing has been changed.

    Args:
        path: name of the file.
        model: the base model, in the structure that it had before it was first expanded, or in any that the run has gone through.
        optimizer: the optimizer of `model`, with its groups as they were; parameters of branches are put into their groups.
        driver: the driver of `model`, with the same schedule.
        random_state: whether Python's and torch's random numbers continue from the saved state, too.
        parts: further parts, by the names under which they were saved. Parts that aren't named here are left in the file.

    Returns:
        The model.

    Raises:
        InvalidInput: the file is no checkpoint, is damaged, or doesn't fit what it is loaded into; the message names what differs.
        OSError: the file can't be read.
    """
    given, model, parts = model, bare(model), _all_parts(driver, parts)
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidInput(f"path is of type {type(path).__name__}: give the name of a file that repfx.save wrote.")
    found = _Checkpoint.read(Path(path))
    modules, optimizers = _modules(model, parts), _optimizers(optimizer, parts)
    others = {name: part for name, part in parts.items() if name not in {*modules, *optimizers}}
    states = {name: found.state(name) for name in (*modules, *optimizers, *others)}
    numbers = [found.state(_RANDOM)] if random_state else []
    for name, module in modules.items():
        found.try_module(name, module)
    with as_before_on_error([*modules.values(), *optimizers.values(), *others.values()]):
        for name, module in modules.items():
            with _fitting(found.path, name):
                found.structure(name).rebuild(module)
                module.load_state_dict(states[name])
        for name, each in optimizers.items():
            with _fitting(found.path, name):
                load_by_name(each, model, states[name])
        for name, part in others.items():
            with _fitting(found.path, name):
                _set_state(part, states[name])
        if driver is not None:
            with _fitting(found.path, _DRIVER):
                driver.require_fits()
        for state in numbers:
            with _fitting(found.path, _RANDOM):
                set_random_state(state)
    return given


def is_checkpoint(path: Path) -> bool:
    """Tell whether a file, which can be of any kind, says that `save` wrote it.

    Raises:
        OSError: the file can't be read.
    """
    safetensors = _package("safetensors")
    with path.open("rb"):
        pass
    try:
        with safetensors.safe_open(path, "pt") as file:
            return _HEAD in (file.metadata() or {})
    except safetensors.SafetensorError:
        return False


@dataclass(frozen=True)
class _Checkpoint:
    """The content of a checkpoint file whose format and checksum have been checked."""

    path: Path
    journals: Mapping[str, Mapping[str, str]]
    states: Mapping[str, Any]
    folded: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> _Checkpoint:
        safetensors = _package("safetensors")
        with path.open("rb"):  # so that a missing file raises the system's own error
            pass
        try:
            with safetensors.safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get(_HEAD)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        except OSError:
            raise
        except Exception as error:  # whatever a forged header makes safetensors fail with
            raise InvalidInput(f"{str(path)!r} is damaged or no checkpoint: {first_line(error)}.") from error
        try:
            head = parse_json(text or "")
            version, checksum = head["format"], head.pop("checksum")
            content = cls(path, head["journals"], head["states"], head[_FOLDED], tensors)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{str(path)!r} is no checkpoint that repfx.save wrote.") from error
        if version != _FORMAT or isinstance(version, bool):
            raise InvalidInput(f"{str(path)!r} has format {version!r}; this version of repfx reads {_FORMAT}.")
        try:
            present = _checksum(head, tensors)
        except Exception as error:  # a tensor of a kind that torch can't read as bytes
            raise InvalidInput(f"{str(path)!r} is damaged: {first_line(error)}.") from error
        if present != checksum:
            raise InvalidInput(f"{str(path)!r} is damaged: its content doesn't fit its checksum.")
        content._require_form()
        return content

    def _require_form(self) -> None:
        """Raise `InvalidInput` unless the head is built as `save` builds it, which a checksum doesn't say of a forged one."""
        names = isinstance(self.states, dict) and all(isinstance(each, dict) for each in (self.journals, self.folded))
        texts = names and all(isinstance(each, dict) for each in self.journals.values())
        if not texts or not all(isinstance(text, str) for each in self.journals.values() for text in each.values()):
            raise InvalidInput(f"{str(self.path)!r} is no checkpoint that repfx.save wrote: its head has another form.")

    def state(self, name: str) -> Any:
        """Return the state of a part; raise `InvalidInput` if the file holds none."""
        if name not in self.states:
            kept = ", ".join(repr(each) for each in self.states if each != _RANDOM)
            raise InvalidInput(f"{str(self.path)!r} holds no {name!r}; it holds {kept}.")
        with _fitting(self.path, name):
            return put_together(self.states[name], dict(self.tensors))

    def try_module(self, name: str, module: nn.Module) -> None:
        """Raise `InvalidInput` if a module can't take its state. This is tried on a copy whose tensors hold no numbers."""
        state = self.state(name)
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise InvalidInput(f"{str(self.path)!r} doesn't fit {name!r}: its state is no dict of tensors by name.")
        scratch: nn.Module = copy_without_numbers(module)
        try:
            self.structure(name).rebuild(scratch)
        except Exception as error:  # a forged journal can make a pass fail with anything
            raise InvalidInput(
                f"{str(self.path)!r} doesn't fit {name!r}, a {type(module).__name__}: its structure can't be rebuilt, "
                f"{_reason(error)}."
            ) from error
        own = scratch.state_dict()
        problems = [f"{key!r} is missing in the file" for key in own.keys() - state.keys()]
        problems += [f"{key!r} is only in the file" for key in state.keys() - own.keys()]
        for key in own.keys() & state.keys():
            shapes = [tuple(entry.shape) if isinstance(entry, Tensor) else () for entry in (state[key], own[key])]
            if shapes[0] != shapes[1]:
                problems.append(f"{key!r} is {shapes[0]} in the file and {shapes[1]} in the model")
            elif _kind_of(state[key]) != _kind_of(own[key]):
                problems.append(f"{key!r} is {_kind_of(state[key])} in the file and {_kind_of(own[key])} in the model")
        if problems:
            shown = "; ".join(sorted(problems)[:3]) + ("; …" if len(problems) > 3 else "")
            raise InvalidInput(f"{str(self.path)!r} doesn't fit {name!r}, a {type(module).__name__}: {shown}.")

    def structure(self, name: str) -> Structure:
        """Return the structure of a module."""
        with _fitting(self.path, name):
            return Structure(self.journals[name], put_together(self.folded[name], dict(self.tensors)))


def _modules(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, nn.Module]:
    return {name: part for name, part in {_MODEL: model, **parts}.items() if isinstance(part, nn.Module)}


# ---- optimizers


def _optimizers(optimizer: torch.optim.Optimizer | None, parts: Mapping[str, Part]) -> dict[str, torch.optim.Optimizer]:
    """Return all optimizers of the model's parameters, by name."""
    own = {} if optimizer is None else {_OPTIMIZER: optimizer}
    return own | {name: part for name, part in parts.items() if isinstance(part, torch.optim.Optimizer)}


# ---- other parts


def _all_parts(driver: Driver | None, parts: Mapping[str, Part]) -> dict[str, Part]:
    own = {} if driver is None else {_DRIVER: driver, **driver.parts}
    taken = {_MODEL, _OPTIMIZER, _RANDOM, *own} & parts.keys()
    if taken:
        raise InvalidInput(f"a part can't be named {', '.join(sorted(taken))}: the checkpoint uses that name itself.")
    for name, part in parts.items():
        if not isinstance(part, (dict, torch.Generator)) and not hasattr(part, "load_state_dict"):
            raise InvalidInput(
                f"{name} is of type {type(part).__name__}, which has no state_dict and load_state_dict: put plain values into a dict."
            )
    return {**own, **parts}


def _state_of(part: Part) -> Any:
    if isinstance(part, dict):
        return part
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _set_state(part: Part, state: Any) -> None:
    if isinstance(part, dict):
        fresh = dict(state)
        part.clear()
        part.update(fresh)
    elif isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        if type(part).__module__.startswith("torch."):  # a scheduler takes anything, and fails at its next step
            _require_alike(state, part.state_dict())
        part.load_state_dict(state)


def _require_alike(state: Any, own: Mapping[str, Any]) -> None:
    for key, value in own.items():
        if key not in state:
            if key.startswith("_"):  # private to a version of torch
                continue
            raise InvalidInput(f"it lacks {key!r}")
        saved, like = state[key], value
        if isinstance(saved, list) and isinstance(value, list) and value:
            like = [value[0]] * len(saved)  # as many as the scheduler had then
        if not is_alike(saved, like):
            raise InvalidInput(f"{key!r} is {str(state[key])[:80]!r}, where {str(value)[:80]!r} was")


def _kind_of(entry: Any) -> str:
    """Whether an entry of a state holds real numbers, whole ones or something else. One kind isn't loaded into another."""
    if not isinstance(entry, Tensor):
        return type(entry).__name__
    return "floats" if entry.is_floating_point() else str(entry.dtype).removeprefix("torch.")


@contextmanager
def _fitting(path: Path, name: str) -> Iterator[None]:
    """Turn whatever a forged or foreign state makes a part fail with into one error that names the part."""
    try:
        yield
    except Exception as error:
        raise InvalidInput(f"{str(path)!r} doesn't fit {name!r}: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    malformed = isinstance(error, (LookupError, TypeError, AttributeError, RecursionError))
    return f"it is malformed ({type(error).__name__}: {first_line(error)})" if malformed else first_line(error)


# ---- the checksum


def _checksum(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _package(name: str) -> Any:
    # numpy is only looked for, not imported: once it is imported, `save` writes the state of its random numbers, too
    missing = [each for each in ("numpy", "safetensors") if importlib.util.find_spec(each) is None]
    if missing:
        raise InvalidInput(f"checkpoints need {missing[0]}, which is missing: pip install 'repfx[checkpoint]'.")
    return importlib.import_module(name)

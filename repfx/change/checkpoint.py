"""Checkpoints: one safetensors file with the weights of a run and, as JSON in its header, the history of its structure.

A model is built again from its class and its journal, so nothing is unpickled. The whole file is checked before any of it is used.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from repfx.change.driver import Driver
from repfx.change.optimizer_groups import fill_groups, lay_out_state, names_by_group
from repfx.change.structure import Structure
from repfx.errors import InvalidInput, RepfxError, first_line
from repfx.records.nested_state import put_together, take_apart
from repfx.records.notes import copy_without_numbers
from repfx.records.random_state import read_random_state, set_random_state
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
    save_file = _package("safetensors.torch").save_file
    tensors: dict[str, Tensor] = {}
    optimizers = _optimizers(optimizer, parts)
    states: dict[str, Any] = {_MODEL: model.state_dict()}
    states |= {name: _state_of(part) for name, part in parts.items() if name not in optimizers}
    states |= {name: _by_name(each, model) for name, each in optimizers.items()}
    if random_state:
        states[_RANDOM] = read_random_state()
    written = {name: take_apart(state, name, tensors) for name, state in states.items()}
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
    modules = _modules(model, parts)
    for name, module in modules.items():
        found.try_module(name, module)
    optimizers = _optimizers(optimizer, parts)
    others = {name: (part, found.state(name)) for name, part in parts.items() if name not in {*modules, *optimizers}}
    groups = {name: found.state(name) for name in optimizers}
    numbers = found.state(_RANDOM) if random_state else None
    for name, each in optimizers.items():
        _check_groups(each, groups[name], found.path)
    _load_all(others, found.path)
    for name, module in modules.items():
        found.load_module(name, module)
    for name, each in optimizers.items():
        _load_optimizer(each, model, groups[name])
    if numbers is not None:
        set_random_state(numbers)
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
        except (safetensors.SafetensorError, ValueError, OverflowError) as error:
            raise InvalidInput(f"{str(path)!r} is damaged or no checkpoint: {first_line(error)}.") from error
        try:
            head = json.loads(text or "")
            version, checksum = head["format"], head.pop("checksum")
            content = cls(path, head["journals"], head["states"], head[_FOLDED], tensors)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{str(path)!r} is no checkpoint that repfx.save wrote.") from error
        if version != _FORMAT:
            raise InvalidInput(f"{str(path)!r} has format {version}; this version of repfx reads {_FORMAT}.")
        if _checksum(head, tensors) != checksum:
            raise InvalidInput(f"{str(path)!r} is damaged: its content doesn't fit its checksum.")
        return content

    def state(self, name: str) -> Any:
        """Return the state of a part; raise `InvalidInput` if the file holds none."""
        if name not in self.states:
            kept = ", ".join(repr(each) for each in self.states if each != _RANDOM)
            raise InvalidInput(f"{str(self.path)!r} holds no {name!r}; it holds {kept}.")
        return put_together(self.states[name], dict(self.tensors))

    def try_module(self, name: str, module: nn.Module) -> None:
        """Raise `InvalidInput` if a module can't take its state. This is tried on a copy whose tensors hold no numbers."""
        state = self.state(name)
        scratch: nn.Module = copy_without_numbers(module)
        try:
            self.structure(name).rebuild(scratch)
        except RepfxError as error:
            raise InvalidInput(
                f"{str(self.path)!r} doesn't fit {name!r}, a {type(module).__name__}: its structure can't be rebuilt, "
                f"{first_line(error)}."
            ) from error
        own = scratch.state_dict()
        problems = [f"{key!r} is missing in the file" for key in own.keys() - state.keys()]
        problems += [f"{key!r} is only in the file" for key in state.keys() - own.keys()]
        for key in own.keys() & state.keys():
            shapes = [tuple(entry.shape) if isinstance(entry, Tensor) else () for entry in (state[key], own[key])]
            if shapes[0] != shapes[1]:
                problems.append(f"{key!r} is {shapes[0]} in the file and {shapes[1]} in the model")
        if problems:
            shown = "; ".join(sorted(problems)[:3]) + ("; …" if len(problems) > 3 else "")
            raise InvalidInput(f"{str(self.path)!r} doesn't fit {name!r}, a {type(module).__name__}: {shown}.")

    def load_module(self, name: str, module: nn.Module) -> None:
        """Rebuild the structure of a module in place, and load its state."""
        self.structure(name).rebuild(module)
        module.load_state_dict(self.state(name))

    def structure(self, name: str) -> Structure:
        """Return the structure of a module."""
        return Structure(self.journals[name], put_together(self.folded[name], dict(self.tensors)))


def _modules(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, nn.Module]:
    return {name: part for name, part in {_MODEL: model, **parts}.items() if isinstance(part, nn.Module)}


# ---- optimizers


def _optimizers(optimizer: torch.optim.Optimizer | None, parts: Mapping[str, Part]) -> dict[str, torch.optim.Optimizer]:
    """Return all optimizers of the model's parameters, by name."""
    own = {} if optimizer is None else {_OPTIMIZER: optimizer}
    return own | {name: part for name, part in parts.items() if isinstance(part, torch.optim.Optimizer)}


def _by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the optimizer's state with the names of parameters in place of their numbers."""
    groups = names_by_group(optimizer, model)
    state = optimizer.state_dict()
    flat = [name for group in groups for name in group]
    return {
        "state": {flat[index]: value for index, value in state["state"].items()},
        "param_groups": [{**group, "params": params} for group, params in zip(state["param_groups"], groups)],
    }


def _check_groups(optimizer: torch.optim.Optimizer, state: Any, path: Path) -> None:
    found, needed = len(state["param_groups"]), len(optimizer.param_groups)
    if found != needed:
        raise InvalidInput(
            f"{str(path)!r} has {found} groups of parameters and the {type(optimizer).__name__} has {needed}; the two must be equal."
        )


def _load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, state: Any) -> None:
    fill_groups(optimizer, model, [saved["params"] for saved in state["param_groups"]])
    numbers = {name: n for n, name in enumerate(n for group in state["param_groups"] for n in group["params"])}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    optimizer.load_state_dict(
        {"state": {numbers[name]: value for name, value in state["state"].items()}, "param_groups": groups}
    )
    lay_out_state(optimizer)


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
        part.clear()
        part.update(state)
    elif isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        part.load_state_dict(state)


def _load_all(parts: Mapping[str, tuple[Part, Any]], path: Path) -> None:
    """Give each part its state. If a part refuses it, the parts before it get back the state that they had."""
    undo: list[tuple[Part, Any]] = []
    for name, (part, state) in parts.items():
        old = copy.deepcopy(_state_of(part))
        try:
            _set_state(part, state)
        except Exception as error:
            for earlier, before in undo:
                _set_state(earlier, before)
            with suppress(Exception):  # the part may refuse its old state, too
                _set_state(part, old)
            raise InvalidInput(f"{str(path)!r} doesn't fit {name!r}: {first_line(error)}.") from error
        undo.append((part, old))


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

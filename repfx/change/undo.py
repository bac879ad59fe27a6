"""`as_before_on_error`: the parts of a run get back all that they held if loading into them fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repfx.records.generators import read_random_state, set_random_state


@contextmanager
def as_before_on_error(parts: Iterable[Any]) -> Iterator[None]:
    """Undo whatever the block has done to modules, optimizers and other parts of a run, and to random numbers, if it raises an error.

    Modules, parameters and groups stay the same objects. Numbers are kept on the CPU in the meantime.
    """
    with ExitStack() as undo:
        undo.callback(set_random_state, read_random_state())
        for part in parts:
            undo.callback(_undo_of(part))
        yield
        undo.pop_all()


def _undo_of(part: Any) -> Callable[[], None]:
    if isinstance(part, nn.Module):
        return _undo_of_module(part)
    if isinstance(part, torch.optim.Optimizer):
        return _undo_of_optimizer(part)
    if isinstance(part, torch.Generator):
        return partial(_set_generator, part, part.get_state())
    if isinstance(part, dict):
        return _undo_of_container(part)
    return _undo_of_object(part)


def _set_generator(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _undo_of_module(root: nn.Module) -> Callable[[], None]:
    undo = [_undo_of_attributes(module) for module in root.modules()]
    undo += [_undo_of_tensor(tensor) for tensor in (*root.parameters(), *root.buffers())]
    return lambda: _all(undo)


def _undo_of_optimizer(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    containers: list[Any] = [optimizer.param_groups, *optimizer.param_groups, optimizer.state]
    containers += [group["params"] for group in optimizer.param_groups]
    containers += [state for state in optimizer.state.values() if isinstance(state, dict)]
    undo = [*map(_undo_of_container, containers), _undo_of_attributes(optimizer)]
    return lambda: _all(undo)


def _undo_of_object(part: Any) -> Callable[[], None]:
    state, undo = copy.deepcopy(part.state_dict()), [_undo_of_attributes(part)] if hasattr(part, "__dict__") else []

    def restore() -> None:
        with suppress(Exception):  # the part may refuse its old state, too
            part.load_state_dict(state)
        _all(undo)

    return restore


def _undo_of_attributes(thing: Any) -> Callable[[], None]:
    """Restore an object's class, its attributes, and what lists and dicts among them hold."""
    kind, before = type(thing), dict(vars(thing))
    undo = [_undo_of_container(value) for value in before.values() if isinstance(value, (dict, list))]

    def restore() -> None:
        if type(thing) is not kind:
            thing.__class__ = kind
        vars(thing).clear()
        vars(thing).update(before)
        _all(undo)

    return restore


def _undo_of_container(container: dict[Any, Any] | list[Any]) -> Callable[[], None]:
    before: Any = dict(container) if isinstance(container, dict) else list(container)

    def restore() -> None:
        container.clear()
        container.update(before) if isinstance(container, dict) else container.extend(before)

    return restore


def _undo_of_tensor(tensor: Tensor) -> Callable[[], None]:
    data, needs_grad, gradient = tensor.data, tensor.requires_grad, tensor.grad
    numbers = None if tensor.is_meta or nn.parameter.is_lazy(tensor) else data.to("cpu", copy=True)

    def restore() -> None:
        tensor.data = data
        if numbers is not None:
            data.copy_(numbers)
        tensor.requires_grad_(needs_grad)
        tensor.grad = gradient

    return restore


def _all(undo: Iterable[Callable[[], None]]) -> None:
    for each in undo:
        each()

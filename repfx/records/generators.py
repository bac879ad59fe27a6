"""Generators of random numbers that a model's code may draw from: whether it has drawn, and how their states are kept."""

from __future__ import annotations

import importlib
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class _Generator:
    """One generator, as functions that read and write its state."""

    read: Callable[[], Any]
    write: Callable[[Any], Any]
    calls_are_seen: bool = False  # whether `_DrawingCalls` notes each draw from it


class Generators:
    """The generators that a model's code may draw from, and the states that they had.

    They are those of Python, torch, numpy and the devices in use, those that modules hold as attributes, and those in the Python modules
    that define the model's classes. Numbers that the operating system gives leave no trace. The states can't tell which thread has drawn;
    `of_this_thread` can.

    >>> generators = Generators(nn.Linear(2, 3))
    >>> generators.have_drawn(), random.random() < 1, generators.have_drawn(), generators.have_drawn()
    (False, True, True, False)
    >>> generators.put_back()
    """

    def __init__(self, model: nn.Module) -> None:
        found = {id(value): value for value in _values_of(model) if type(value) not in _NO_GENERATORS}
        self._all = [*_of_process(), *filter(None, map(_generator, found.values()))]
        self._first = self._seen = self._states()
        self._calls: _DrawingCalls | None = None

    def have_drawn(self) -> bool:
        """Whether any of them has given a number since the last time that this was asked."""
        before, self._seen = self._seen, self._states()
        moved = [generator for generator, *states in zip(self._all, before, self._seen) if not _same(*states)]
        if self._calls is None:
            return bool(moved)
        return self._calls.any_since_asked() or not all(generator.calls_are_seen for generator in moved)

    @contextmanager
    def of_this_thread(self) -> Iterator[None]:
        """Let `have_drawn` count what other threads draw from the generators of Python and torch for nothing.

        The calls of this thread are watched meanwhile, which makes it slower. Where a profiler watches them already, nothing changes.
        """
        if sys.getprofile() is not None:
            yield
            return
        with _DrawingCalls() as self._calls:
            try:
                yield
            finally:
                self._calls = None

    def put_back(self) -> None:
        """Give each of them that has drawn the state back that it had at first."""
        for generator, state in zip(self._all, self._first):
            if not _same(generator.read(), state):
                generator.write(state)

    def _states(self) -> list[Any]:
        return [generator.read() for generator in self._all]


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Let the generators that a model's code may draw from go on undisturbed afterwards, even after an error."""
    generators = Generators(model)
    try:
        yield
    finally:
        generators.put_back()


def _of_process() -> Iterator[_Generator]:
    """Yield the generators that all code of this process shares. Devices that aren't in use yet have none."""
    yield _Generator(random.getstate, random.setstate, calls_are_seen=True)
    for each in _of_torch():
        yield _Generator(each.get_state, each.set_state, calls_are_seen=True)
    if torch.backends.mps.is_available():
        yield _Generator(torch.mps.get_rng_state, torch.mps.set_rng_state, calls_are_seen=True)
    if "numpy" in sys.modules:
        yield _of_numpy(sys.modules["numpy"].random)


def _of_torch() -> list[torch.Generator]:
    more = getattr(torch.xpu, "default_generators", ())
    return [torch.default_generator, *torch.cuda.default_generators, *more]


class _DrawingCalls(TorchDispatchMode):
    """Notes what this thread draws from the generators of Python and torch that all code shares.

    torch marks the operators that draw. Whatever draws from Python's generator, or seeds one of these, is a call of a method in C.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._noted = False
        self._methods_of = {id(each) for each in (random.random.__self__, *_of_torch())}  # type: ignore[attr-defined]

    def any_since_asked(self) -> bool:
        """Whether anything was noted since the last time that this was asked."""
        noted, self._noted = self._noted, False
        return noted

    def __enter__(self) -> _DrawingCalls:
        sys.setprofile(self._called)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        sys.setprofile(None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._noted |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))

    def _called(self, frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and id(getattr(function, "__self__", None)) in self._methods_of:
            self._noted |= function.__name__ not in ("getstate", "get_state")


def _values_of(model: nn.Module) -> Iterator[Any]:
    """Yield the attributes of all modules, and all that the Python modules hold in which their classes are defined."""
    files: set[str] = set()
    for module in model.modules():
        yield from vars(module).values()
        files.update(cls.__module__ for cls in type(module).__mro__)
    for name in files:
        if not name.startswith(("torch.", "builtins")):
            yield from list(vars(sys.modules[name]).values() if name in sys.modules else ())


_NO_GENERATORS = {bool, int, float, str, tuple, list, dict, set, OrderedDict, type(None), type, FunctionType, Tensor}


def _generator(value: Any) -> _Generator | None:
    """Return an object of Python, torch or numpy that draws random numbers as a generator; None for any other value."""
    cls = type(value)  # asked instead of `isinstance`, which may run code of the value
    if issubclass(cls, random.Random) and not issubclass(cls, random.SystemRandom):
        return _Generator(value.getstate, value.setstate)
    if issubclass(cls, torch.Generator):
        return _Generator(value.get_state, value.set_state)
    numbers = sys.modules["numpy"].random if "numpy" in sys.modules else None
    if numbers is not None and issubclass(cls, numbers.RandomState):
        return _of_numpy(value)
    if numbers is not None and issubclass(cls, numbers.Generator):
        bits = value.bit_generator
        return _Generator(lambda: bits.state, lambda state: setattr(bits, "state", state))
    return None


def _of_numpy(numbers: Any) -> _Generator:
    return _Generator(partial(numbers.get_state, legacy=False), numbers.set_state)


def _same(a: Any, b: Any) -> bool:
    """Whether two states of one generator are equal. Those of numpy are dicts with arrays."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return all(_same(a[name], b[name]) for name in a)
    return bool(a.tobytes() == b.tobytes() if hasattr(a, "tobytes") else a == b)


def read_random_state() -> dict[str, Any]:
    """Return the state of this process's random numbers, those of numpy only if it is imported."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    state = {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (kind, keys.tolist(), *rest)
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the random numbers of this process to a state that `read_random_state` returned."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    if "numpy" in state:
        importlib.import_module("numpy").random.set_state(state["numpy"])

"""The seconds that each layer of a model takes in torch, measured by hooks: its own time, without that of the modules inside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repfx.measuring.cost import Flops
from repfx.measuring.in_float64 import Inputs, as_arguments
from repfx.profiling.timing import Timing
from repfx.records.modes import in_eval_mode


@dataclass(frozen=True)
class Work:
    """The work of a layer in one run.

    Args:
        macs: multiply-adds of convs and matrix products.
        moved: bytes of its inputs, outputs and parameters.
    """

    macs: int
    moved: int


@dataclass(frozen=True)
class Layers:
    """The time of a model.

    Args:
        whole: of a run without hooks.
        own: of each module that was called, by path.
        work: of each module that calls no other one.
    """

    whole: Timing
    own: Mapping[str, Timing]
    work: Mapping[str, Work]


def layer_times(models: Mapping[str, nn.Module], x: Inputs, *, rounds: int, warm_up: int = 3) -> dict[str, Layers]:
    """Measure models on one input in eval mode. They take turns, and each runs with and without hooks in every turn.

    The time that the hooks themselves take is the difference of these two runs. It is taken off each call of a hook alike.

    Args:
        models: models without hooks of their own. The modules inside squeezed blocks are run one by one.
        rounds: number of turns that count, after `warm_up` turns that don't.
    """
    args, kwargs = as_arguments(x)
    whole: dict[str, list[float]] = {name: [] for name in models}
    runs: dict[str, list[list[tuple[str, float]]]] = {name: [] for name in models}
    work = {}
    with ExitStack() as stack, torch.no_grad():
        for model in models.values():
            stack.enter_context(in_eval_mode(model))
        for name, model in models.items():
            work[name] = _work(model, args, kwargs)
        order = list(models)
        for turn in range(warm_up + rounds):
            for name in order:
                seconds, parts = _seconds(models[name], args, kwargs), _own_seconds(models[name], args, kwargs)
                if turn >= warm_up:
                    whole[name].append(seconds)
                    runs[name].append(parts)
            order.append(order.pop(0))
    return {name: Layers(Timing(tuple(whole[name])), _summed(runs[name], whole[name]), work[name]) for name in models}


def _summed(runs: Sequence[Sequence[tuple[str, float]]], whole: Sequence[float]) -> dict[str, Timing]:
    """Return the own time of each module, without the time that the hooks take."""
    watched = statistics.median(sum(seconds for _, seconds in run) for run in runs)
    hook = max(0.0, watched - statistics.median(whole)) / max(1, len(runs[0]))
    own: dict[str, list[float]] = {}
    for number, run in enumerate(runs):
        for path, seconds in run:
            own.setdefault(path, [0.0] * len(runs))[number] += max(0.0, seconds - hook)
    return {path: Timing(tuple(each)) for path, each in own.items()}


class _Clock:
    """A clock that can be read without waiting for the device."""

    def __init__(self) -> None:
        self._events = torch.cuda.is_available()

    def now(self) -> Any:
        if not self._events:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        if not self._events:
            return float(second - first)
        second.synchronize()
        return float(first.elapsed_time(second)) / 1e3


def _seconds(model: nn.Module, args: Any, kwargs: Any) -> float:
    clock = _Clock()
    began = clock.now()
    model(*args, **kwargs)
    return clock.between(began, clock.now())


@dataclass
class _Watch:
    """The modules that run, as a stack, and the moments at which the innermost one changes."""

    clock: _Clock
    running: list[str] = field(default_factory=list)
    moments: list[tuple[str, Any]] = field(default_factory=list)  # who runs from this moment on

    def enter(self, path: str, *_: Any) -> None:
        self.running.append(path)
        self.moments.append((path, self.clock.now()))

    def leave(self, *_: Any) -> None:
        self.running.pop()
        self.moments.append((self.running[-1] if self.running else "", self.clock.now()))


@contextmanager
def _hooked(model: nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    """Call functions at the beginning and the end of each module, with its path before what a hook gets."""
    with ExitStack() as stack:
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(enter, path)).remove)
            stack.callback(module.register_forward_hook(partial(leave, path)).remove)
        yield


def _own_seconds(model: nn.Module, args: Any, kwargs: Any) -> list[tuple[str, float]]:
    """Return which module ran, and for how long, between each two calls of hooks."""
    watch = _Watch(_Clock())
    with _hooked(model, watch.enter, watch.leave):
        model(*args, **kwargs)
    moments = watch.moments
    return [(path, watch.clock.between(begin, end)) for (path, begin), (_, end) in pairwise(moments)]


def _work(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Work]:
    flops = Flops()
    begins: list[int] = []
    found: dict[str, Work] = {}
    containers: set[str] = set()
    running: list[str] = []

    def enter(path: str, *_: Any) -> None:
        containers.update(running)
        running.append(path)
        begins.append(flops.total)

    def leave(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()
        tensors = [*tree_leaves(inputs), *tree_leaves(output), *module.parameters()]
        moved = sum(each.numel() * each.element_size() for each in tensors if isinstance(each, Tensor))
        before = found.get(path, Work(0, 0))
        found[path] = Work(before.macs + (flops.total - begins.pop()) // 2, before.moved + moved)

    with _hooked(model, enter, leave), flops:
        model(*args, **kwargs)
    return {path: work for path, work in found.items() if path not in containers}

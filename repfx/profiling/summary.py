"""`summary`: two forms of a model side by side, in parameters, multiply-adds, layers and latency."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from repfx.errors import InvalidInput, first_line
from repfx.measuring.cost import count_layers, count_macs, count_parameters, measure_times
from repfx.measuring.in_float64 import Inputs, as_arguments, describe
from repfx.profiling.timing import Timing
from repfx.records.generators import random_state_kept
from repfx.records.modes import in_eval_mode
from repfx.records.module_tree import require_module
from repfx.records.number_text import engineering

_ROWS = ("parameters", "multiply-adds", "convs", "BatchNorms", "latency")


@dataclass(frozen=True)
class Size:
    """The cost of one form of a model in eval mode.

    Args:
        parameters: number of parameters, trainable or not.
        macs: multiply-adds of one run on x.
        convs: number of convs.
        batch_norms: number of BatchNorms.
        latency: time of one run on x.
    """

    parameters: int
    macs: int
    convs: int
    batch_norms: int
    latency: Timing

    @property
    def texts(self) -> tuple[str, ...]:
        """The numbers as text, in the order of the fields."""
        counts = (engineering(self.parameters), engineering(self.macs), str(self.convs), str(self.batch_norms))
        return (*counts, str(self.latency))


@dataclass(frozen=True)
class Summary:
    """Two forms of a model. As text it is a table.

    Args:
        before, after: what each costs.
    """

    before: Size
    after: Size

    @property
    def speed_up(self) -> float:
        """How many times as quick the second form is."""
        return self.before.latency.median / self.after.latency.median

    def __str__(self) -> str:
        rows = zip(("", *_ROWS), ("before", *self.before.texts), ("after", *self.after.texts))
        return "\n".join(f"{name:<13} {old:>10} {new:>10}" for name, old, new in rows)


def summary(before: nn.Module, after: nn.Module, x: Inputs, *, rounds: int = 20) -> Summary:
    """Compare what two forms of a model cost on one input in eval mode. Neither is changed.

    The two take turns, so that both see the same state of the machine.

    Args:
        before: such as the model in its training form.
        after: such as the fused model.
        x: an example: a tensor, a tuple of positional inputs, a dict of keyword inputs, or a list that is one input.
        rounds: number of runs that count.

    Raises:
        InvalidInput: a model can't run on x, or `rounds` isn't positive.

    >>> from repfx.passes.expand import expand
    >>> from repfx.passes.fuse import fuse
    >>> model = expand(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "acb")
    >>> found = summary(model, fuse(model), torch.randn(1, 3, 16, 20), rounds=2)
    >>> found.before.convs, found.after.convs, found.after.batch_norms
    (3, 1, 0)
    >>> print(str(found).splitlines()[1])
    parameters           416        224
    """
    if rounds < 1:
        raise InvalidInput(f"rounds is {rounds}: at least one run must count.")
    forms = {"before": before, "after": after}
    with ExitStack() as stack:
        for form in forms.values():
            require_module(form)
            stack.enter_context(random_state_kept(form))
            stack.enter_context(in_eval_mode(form))
        stack.enter_context(torch.no_grad())
        macs = {name: _macs(form, x, name) for name, form in forms.items()}
        times = measure_times({name: _run(form, x) for name, form in forms.items()}, rounds=rounds)
    return Summary(**{name: _size(form, macs[name], times[name]) for name, form in forms.items()})


def _macs(model: nn.Module, x: Inputs, name: str) -> int:
    try:
        return count_macs(model, x)
    except Exception as error:
        raise InvalidInput(f"the model `{name}` can't run on x = {describe(x)}: {first_line(error)}.") from error


def _run(model: nn.Module, x: Inputs) -> Callable[[], Any]:
    args, kwargs = as_arguments(x)
    return lambda: model(*args, **kwargs)


def _size(model: nn.Module, macs: int, seconds: list[float]) -> Size:
    layers = count_layers(model)
    return Size(count_parameters(model), macs, layers.convs, layers.norms, Timing(tuple(seconds)))

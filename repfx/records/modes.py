"""Training and eval mode, module by module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


def set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Put modules into the modes that they are given with, in this order: a module comes before those inside it.

    A module that has another mode is told so by its `train`, which may do more than set it. The feature extractors of torchvision exchange
    their graphs, for example.
    """
    modes = list(modes)
    for module, training in modes:
        if module.training is not training:
            module.train(training)
    for module, training in modes:
        module.training = training


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode inside, and give each module its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        set_modes(modes)

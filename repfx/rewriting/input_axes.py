"""The number of axes of the inputs of linear layers and BatchNorms, found by running the model on the meta device.

BatchNorm1d counts its channels on the second axis, a linear layer on the last. So the number of axes decides whether the two agree, and a
graph alone often doesn't show it. The run computes no numbers. Its input is what the model's first conv takes, so nothing is known of a
model without convs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from repfx.algebra.layers import BATCH_NORMS, is_conv
from repfx.records.notes import copy_without_numbers

_SIDES = (224, 64, 32)  # side lengths of the inputs that are tried


class InputAxes:
    """The numbers of axes in a model, by module path. The first question runs a copy of the model without numbers, once.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4))
    >>> InputAxes(model).of("4"), InputAxes(nn.Sequential(nn.Linear(8, 4))).of("0")
    (2, None)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def of(self, path: str) -> int | None:
        """Return how many axes the input of the module at `path` has, batch included. Return None if that isn't known or calls differ."""
        seen = self._seen.get(path, set())
        return next(iter(seen)) if len(seen) == 1 else None

    @cached_property
    def _seen(self) -> dict[str, set[int]]:
        seen: dict[str, set[int]] = {}

        def watch(path: str) -> Any:
            def record(module: nn.Module, args: tuple[Any, ...]) -> None:
                if args and isinstance(args[0], Tensor):
                    seen.setdefault(path, set()).add(args[0].ndim)

            return record

        try:
            twin = _without_numbers(self._model)
        except Exception:  # a model may hold tensors where no copy reaches them
            return seen
        for path, module in twin.named_modules():
            if isinstance(module, (nn.Linear, BATCH_NORMS)):
                module.register_forward_pre_hook(watch(path))
        for x in _inputs(twin):
            try:
                with torch.no_grad():
                    twin(x)
            except Exception:  # the size doesn't fit, or the model looks at numbers; what was seen until here holds
                continue
            break
        return seen


def _without_numbers(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode on the meta device."""
    scratch: nn.Module = copy_without_numbers(model)
    scratch.eval()
    return scratch


def _inputs(model: nn.Module) -> Iterator[Tensor]:
    conv: Any = next((module for module in model.modules() if is_conv(module)), None)
    if conv is None:
        return
    own = (getattr(model, "default_cfg", None) or {}).get("input_size")
    shapes = [own] if own else []
    shapes += [(conv.in_channels, *(side,) * len(conv.kernel_size)) for side in _SIDES]
    for shape in shapes:
        yield torch.empty(2, *shape, device="meta", dtype=conv.weight.dtype)

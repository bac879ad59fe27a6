"""How many axes the inputs of linear layers and BatchNorms have, as a run of the model on the meta device shows.

BatchNorm1d counts its channels on the second axis, a linear layer on the last, so the number of axes decides whether the two agree; a
graph alone often doesn't say. The run computes no numbers. It starts from what the model's first conv takes; of a model without convs
nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from repfx.algebra.layers import BATCH_NORMS, is_conv
from repfx.records.notes import copy_without_numbers

_SIDES = (224, 64, 32)  # of the inputs that are tried


class InputAxes:
    """Of a model, by module path; the model is run once, on a copy without numbers, when it is first asked.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4))
    >>> InputAxes(model).of("4"), InputAxes(nn.Sequential(nn.Linear(8, 4))).of("0")
    (2, None)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def of(self, path: str) -> int | None:
        """The axes of what the module at `path` is called with, the batch among them; None if that isn't known or differs."""
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
            except Exception:  # of another size, or a model that looks at numbers; what was seen until here holds
                continue
            break
        return seen


def _without_numbers(model: nn.Module) -> nn.Module:
    """A copy in eval mode on the meta device."""
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

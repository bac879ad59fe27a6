"""The shapes of the inputs of convs, linear layers and BatchNorms, found by running the model on the meta device.

BatchNorm1d counts its channels on the second axis, a linear layer on the last. So the number of axes decides whether the two agree, and a
graph alone often doesn't show it. The run computes no numbers. Without an example, its input is what the model's first conv takes, so
nothing is known of a model without convs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from repfx.algebra.cost import Shape
from repfx.algebra.layers import BATCH_NORMS, is_conv
from repfx.records.notes import copy_without_numbers

_SIDES = (224, 64, 32)  # side lengths of the inputs that are tried


class InputShapes:
    """The shapes of inputs in a model, by module path. The first question runs a copy of the model without numbers, once.

    Args:
        given: what a caller gives the model, by the name of the argument. Sizes are known only of such an input.


    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4))
    >>> InputShapes(model).axes("4"), InputShapes(nn.Sequential(nn.Linear(8, 4))).axes("0")
    (2, None)
    """

    def __init__(self, model: nn.Module, given: Mapping[str, Any] | None = None) -> None:
        self._model = model
        self.given = given or {}

    def axes(self, path: str) -> int | None:
        """Return how many axes the input of the module at `path` has, batch included. Return None if that isn't known or calls differ."""
        counts = {len(shape) for shape in self._seen.get(path, set())}
        return next(iter(counts)) if len(counts) == 1 else None

    def of(self, path: str) -> Shape | None:
        """Return the shape of the input of the module at `path`. Return None if no input was given, or if calls differ."""
        shapes = self._seen.get(path, set()) if self.given else set()
        return next(iter(shapes)) if len(shapes) == 1 else None

    @cached_property
    def _seen(self) -> dict[str, set[Shape]]:
        seen: dict[str, set[Shape]] = {}

        def watch(path: str) -> Any:
            def record(module: nn.Module, args: tuple[Any, ...]) -> None:
                if args and isinstance(args[0], Tensor):
                    seen.setdefault(path, set()).add(tuple(args[0].shape))

            return record

        try:
            twin = _without_numbers(self._model)
        except Exception:  # a model may hold tensors where no copy reaches them
            return seen
        for path, module in twin.named_modules():
            if is_conv(module) or isinstance(module, (nn.Linear, BATCH_NORMS)):
                module.register_forward_pre_hook(watch(path))
        for inputs in [_without_values(self.given)] if self.given else _inputs(twin):
            try:
                with torch.no_grad():
                    twin(**inputs) if isinstance(inputs, dict) else twin(inputs)
            except Exception:  # the size doesn't fit, or the model looks at numbers; what was seen until here holds
                continue
            break
        return seen


def _without_numbers(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode on the meta device."""
    scratch: nn.Module = copy_without_numbers(model)
    scratch.eval()
    return scratch


def _without_values(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with empty tensors in place of tensors."""
    found: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), dict(inputs))
    return found


def _inputs(model: nn.Module) -> Iterator[Tensor]:
    conv: Any = next((module for module in model.modules() if is_conv(module)), None)
    if conv is None:
        return
    own = (getattr(model, "default_cfg", None) or {}).get("input_size")
    shapes = [own] if own else []
    shapes += [(conv.in_channels, *(side,) * len(conv.kernel_size)) for side in _SIDES]
    for shape in shapes:
        yield torch.empty(2, *shape, device="meta", dtype=conv.weight.dtype)

"""Linear maps in a graph: `read_op` reads a call of a module, function or method as the linear map of one input (`Op`)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra.kernel import Kernel, NoKernel
from repfx.algebra.meaning import (
    Meaning,
    average_pool_meaning,
    identity_meaning,
    is_exactly,
    meaning_of,
    pad_meaning,
    pairs_of,
    per_axis,
    wraps_the_rest,
)
from repfx.graphs.constants import Constants
from repfx.graphs.dropout import MODULES
from repfx.graphs.indexing import crop_meaning
from repfx.graphs.vocabulary import ARITHMETIC, NEGATIONS, PRODUCTS, QUOTIENTS, SUBTRACTIONS
from repfx.records.module_tree import called_by


@dataclass(frozen=True)
class Op:
    """A node that is a linear map of `source`. `inner` holds the nodes between the two, the last one first."""

    node: fx.Node
    source: fx.Node
    meaning: Meaning
    inner: tuple[fx.Node, ...] = ()

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.node, *self.inner)


def read_op(node: fx.Node, root: nn.Module, constants: Constants | None = None) -> Op | None:
    """Read a node as a linear map, or return None."""
    constants = constants or Constants(node.graph, root)
    if node.op == "call_module":
        meaning = meaning_of(called_by(root, node))
        source = _only_input(node)
        return Op(node, source, meaning) if meaning is not None and source is not None else None
    if node.op not in ("call_function", "call_method"):
        return None
    reader = _FUNCTIONS.get(node.target)
    if reader is not None:
        first, others, keywords = split(node)
        meaning = reader(*others, **keywords)
        return Op(node, first, meaning) if meaning is not None and isinstance(first, fx.Node) else None
    return _read_arithmetic(node, constants)


def split(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Split the arguments of a call into its input, which may be written as `input=`, and the others, by position and by keyword."""
    if node.args:
        return node.args[0], node.args[1:], node.kwargs
    keywords = dict(node.kwargs)
    return keywords.pop("input", None), (), keywords


def _only_input(node: fx.Node) -> fx.Node | None:
    inputs = [*node.args, *node.kwargs.values()]
    return inputs[0] if len(inputs) == 1 and isinstance(inputs[0], fx.Node) else None


# ---- torch.nn.functional


def _read_average_pool(dimensions: int) -> Callable[..., Meaning | None]:
    def read(
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Meaning | None:
        try:
            sizes = [per_axis(size, dimensions) for size in (kernel_size, stride or kernel_size, padding)]
        except TypeError:  # a size computed in the graph
            return None
        if ceil_mode or (any(sizes[2]) and not count_include_pad):
            return None
        return average_pool_meaning(dimensions, sizes[0], sizes[1], sizes[2], divisor_override)

    return read


def _read_pad(pad: Any, mode: str = "constant", value: float | None = None) -> Meaning | None:
    if not isinstance(pad, (tuple, list)) or not all(isinstance(side, int) for side in pad) or len(pad) % 2:
        return None
    if mode == "constant" and value not in (None, 0):
        return None
    padding = pairs_of(tuple(pad))
    return None if wraps_the_rest(padding, mode) else pad_meaning(padding, "zeros" if mode == "constant" else mode)


def _read_leaky_relu(negative_slope: Any = 0.01, inplace: bool = False) -> Meaning | None:
    return identity_meaning(lasts=False) if is_exactly(negative_slope, 1) else None


def _read_dropout(p: Any = 0.5, training: Any = True, inplace: bool = False, *, train: Any = None) -> Meaning | None:
    return identity_meaning(lasts=False) if is_exactly(p, 0) else None


_FUNCTIONS: dict[Any, Callable[..., Meaning | None]] = {
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _read_leaky_relu),
    **dict.fromkeys(
        (*MODULES, torch.dropout, torch.dropout_, torch.alpha_dropout, torch.feature_dropout), _read_dropout
    ),
    F.avg_pool1d: _read_average_pool(1),
    F.avg_pool2d: _read_average_pool(2),
    F.avg_pool3d: _read_average_pool(3),
    F.pad: _read_pad,
    operator.getitem: crop_meaning,
}


# ---- arithmetic with constants


def _read_arithmetic(node: fx.Node, constants: Constants) -> Op | None:
    first, others, keywords = split(node)
    if node.target in NEGATIONS and isinstance(first, fx.Node) and not others and not keywords:
        return Op(node, first, affine_meaning(lambda like: (like.new_tensor(-1.0), None)))
    known = node.target in ARITHMETIC - NEGATIONS
    if not known or len(node.args) != 2 or node.kwargs:
        return None
    left, right = (constants.number(argument) for argument in node.args)
    if (left is None) == (right is None):
        return None
    source = node.args[0] if left is None else node.args[1]
    if not isinstance(source, fx.Node):
        return None
    maps = _map_with_constant(node.target, left, right)
    return None if maps is None else Op(node, source, affine_meaning(maps))


_ScaleAndShift = tuple[Tensor, Tensor | None]


def _map_with_constant(
    target: Any, left: Tensor | float | None, right: Tensor | float | None
) -> Callable[[Tensor], _ScaleAndShift] | None:
    """Return a function that gives (scale, shift) of ``left ∘ x`` or ``x ∘ right``, or None for ``left / x``."""
    value = right if left is None else left
    if target in PRODUCTS:
        return lambda like: (_tensor(value, like), None)
    if target in QUOTIENTS:
        return (lambda like: (1 / _tensor(value, like), None)) if left is None else None
    sign = -1.0 if target in SUBTRACTIONS else 1.0
    if left is None:
        return lambda like: (like.new_tensor(1.0), sign * _tensor(value, like))
    return lambda like: (like.new_tensor(sign), _tensor(value, like))


def _tensor(value: Tensor | float | None, like: Tensor) -> Tensor:
    return value.to(like) if isinstance(value, Tensor) else like.new_tensor(value)


def affine_meaning(scale_and_shift: Callable[[Tensor], _ScaleAndShift]) -> Meaning:
    """Return the map ``scale · x + shift``, of the function that gives both in the dtype and on the device of a tensor."""

    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        scale, shift = scale_and_shift(like)
        vectors = (
            per_channel(scale, channels, dimensions),
            shift if shift is None else per_channel(shift, channels, dimensions),
        )
        return Kernel.diagonal(*vectors, dimensions)

    return Meaning("affine", None, None, build)


def per_channel(value: Tensor, channels: int, dimensions: int) -> Tensor:
    """Return a constant that broadcasts against ``(batch, channels, *axes)`` as a vector ``(channels,)``.

    Raises:
        NoKernel: the constant varies along another axis, or its number of channels doesn't fit.
    """
    shape = (1,) * (dimensions + 2 - value.ndim) + tuple(value.shape)
    if (
        len(shape) > dimensions + 2
        or any(size != 1 for size in (shape[0], *shape[2:]))
        or shape[1] not in (1, channels)
    ):
        raise NoKernel(
            f"a constant of shape {tuple(value.shape)} isn't one number, or one for each of {channels} channels"
        )
    return value.reshape(-1).expand(channels)

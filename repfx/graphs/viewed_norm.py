"""BatchNorms of sequences: code moves the channels from the last axis to where BatchNorm1d counts them, and back.

``norm(y.flatten(0, 1)).reshape_as(y)`` and ``norm(y.transpose(1, 2)).transpose(1, 2)`` scale and shift the last axis of y. The rows and the
bias of a linear layer act on the same axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer
from repfx.algebra.meaning import Meaning, affine_of, torch_class
from repfx.graphs.operations import Op

_FLATTEN = {torch.flatten, "flatten"}
_RESHAPE = {torch.reshape, "reshape", "view"}
_LIKE = {"reshape_as", "view_as"}
_TRANSPOSE = {torch.transpose, torch.swapaxes, "transpose", "swapaxes"}
_PERMUTE = {torch.permute, "permute"}


def read_viewed_norm(node: fx.Node, norm: Layer, normed: fx.Node, axes: int | None) -> Op | None:
    """Read `node`, a view of the output of BatchNorm `norm` at `normed`, as a scale and shift. Return None if it is no such view.

    Args:
        axes: number of axes of the BatchNorm's input, or None if it isn't known.
    """
    before = normed.args[0] if normed.args else None
    if not isinstance(before, fx.Node) or torch_class(norm) is not torch.nn.BatchNorm1d:
        return None
    source = before.args[0] if before.args else None
    if not isinstance(source, fx.Node):
        return None
    flat = axes == 2 and _flattens(before) and node.target in _LIKE and node.args == (normed, source)
    turned = axes == 3 and _turns(before) and _turns(node)
    if not (flat or turned):
        return None

    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        return Kernel.diagonal(*affine_of(norm, like), dimensions)

    return Op(node, source, Meaning("affine", 0, norm.running_mean.shape[0], build), (normed, before))


def _flattens(node: fx.Node) -> bool:
    """Whether a node merges all axes but the last into one."""
    arguments = _arguments(node)
    if node.target in _FLATTEN:
        # (0, 1) is all axes but the last, for the input has three: BatchNorm1d gets two axes, and takes no vector
        return arguments in ((0, 1), (0, -2)) and not node.kwargs
    return node.target in _RESHAPE and len(arguments) == 2 and arguments[0] == -1


def _turns(node: fx.Node) -> bool:
    """Whether a node swaps the last two of three axes."""
    arguments = _arguments(node)
    if node.kwargs:
        return False
    if node.target in _PERMUTE:
        return arguments in ((0, 2, 1), (0, -1, 1), (0, -1, -2), (0, 2, -2))
    return (
        node.target in _TRANSPOSE and len(arguments) == 2 and {a % 3 for a in arguments if isinstance(a, int)} == {1, 2}
    )


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """The arguments after the tensor, be they one tuple or several numbers."""
    rest = node.args[1:]
    return tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest

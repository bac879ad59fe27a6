"""Calls of functions that take several tensors and are a linear map of one of them, because the others are constants or don't count.

``F.batch_norm`` with given statistics and ``torch.addcmul`` scale and shift. ``F.prelu`` with slopes of 1, and mixtures of a value and its
activation in which the activation has the weight 0, hand the value on.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra.kernel import Kernel
from repfx.algebra.meaning import Meaning, affine_of, identity_meaning
from repfx.graphs.aliasing import mutated_by
from repfx.graphs.constants import Constants
from repfx.graphs.norm_calls import NormCall
from repfx.graphs.operations import Op, affine_meaning
from repfx.graphs.vocabulary import ADDITIONS, ARITHMETIC, ELEMENTWISE, ELEMENTWISE_LAYERS, PRODUCTS
from repfx.records.module_tree import called_by

_ADDCMUL = {torch.addcmul, "addcmul", "addcmul_"}
_LERP = {torch.lerp, "lerp", "lerp_"}
_PRELU = {torch.prelu, F.prelu, "prelu"}

Arguments: TypeAlias = dict[str, Any]


def read_call_with_tensors(node: fx.Node, root: nn.Module, constants: Constants) -> Op | None:
    """Read a node as a linear map of one of the tensors that it takes, or return None."""
    if node.target in ADDITIONS:
        return _read_mixture(node, root, constants)
    signature, reader = _reader_of(node, root)
    if signature is None or reader is None:
        return None
    try:
        call = signature(*node.args, **node.kwargs)
    except TypeError:  # other arguments, such as `out`
        return None
    return reader(node, call, root, constants)


_Reader: TypeAlias = Callable[[fx.Node, Arguments, nn.Module, Constants], "Op | None"]


def _reader_of(node: fx.Node, root: nn.Module) -> tuple[Callable[..., Arguments] | None, _Reader | None]:
    """Return what the function that a node calls takes, and the reader of its calls."""
    if is_norm_call(node, root):
        return _batch_norm, _read_batch_norm
    known = _CALLS.get(node.target) if node.op in ("call_function", "call_method") else None
    return known or (None, None)


# ---- scales and shifts


def is_norm_call(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node normalises by a call of `F.batch_norm`, or by one that follows the mode."""
    if node.op == "call_module":
        return isinstance(called_by(root, node), NormCall)
    return node.op == "call_function" and node.target is F.batch_norm


def _read_batch_norm(node: fx.Node, call: Arguments, root: nn.Module, constants: Constants) -> Op | None:
    tensors = [call[name] for name in ("running_mean", "running_var", "weight", "bias")]
    mean, variance, weight, bias = found = [constants.tensor(value) for value in tensors]
    known = all((value is None) is (given is None) for value, given in zip(found, tensors))
    eps = constants.number(call["eps"])
    if not known or mean is None or variance is None or not isinstance(eps, float) or call["training"] is not False:
        return None
    if not isinstance(call["input"], fx.Node) or constants.depends_on_parameters_alone(call["input"]):
        return None
    norm = SimpleNamespace(running_mean=mean, running_var=variance, weight=weight, bias=bias, eps=eps)

    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        return Kernel.diagonal(*affine_of(norm, like), dimensions)

    return Op(node, call["input"], Meaning("affine", None, mean.numel(), build, lasts=False))


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> Arguments:
    return locals()


def _read_addcmul(node: fx.Node, call: Arguments, root: nn.Module, constants: Constants) -> Op | None:
    """Read ``shift + value · scale · x``, or ``x + value · a · b``."""
    factor = constants.number(call["value"])
    tensors = (call["input"], call["tensor1"], call["tensor2"])
    shift, first, second = (constants.tensor(value) for value in tensors)
    varying = [value for value, known in zip(tensors, (shift, first, second)) if known is None]
    if not isinstance(factor, float) or len(varying) != 1 or not isinstance(varying[0], fx.Node):
        return None
    if first is not None and second is not None:
        product = factor * first * second
        return Op(node, varying[0], affine_meaning(lambda like: (like.new_tensor(1.0), product.to(like))))
    scale = second if first is None else first
    if scale is None or shift is None:
        return None
    return Op(node, varying[0], affine_meaning(lambda like: (factor * scale.to(like), shift.to(like))))


def axes_of_constants(node: fx.Node, constants: Constants) -> int:
    """Return the most axes of the tensors that arithmetic scales and shifts by. The output has as many axes, even if the input hasn't."""
    if node.target not in ARITHMETIC | _ADDCMUL:
        return 0
    found = (constants.tensor(argument) for argument in node.args)
    return max((constant.ndim for constant in found if constant is not None), default=0)


def _addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Arguments:
    return locals()


# ---- maps that hand a value on


def _read_prelu(node: fx.Node, call: Arguments, root: nn.Module, constants: Constants) -> Op | None:
    slopes = constants.tensor(call["weight"])
    if slopes is None or slopes.is_meta or bool((slopes != 1).any()) or not isinstance(call["input"], fx.Node):
        return None
    return Op(node, call["input"], identity_meaning(lasts=False))


def _prelu(input: Any, weight: Any) -> Arguments:
    return locals()


def _read_lerp(node: fx.Node, call: Arguments, root: nn.Module, constants: Constants) -> Op | None:
    """Read ``start + weight · (end - start)`` with a weight of 0 or 1, where the part that doesn't count is an activation of the other."""
    start, end = call["input"], call["end"]
    if not isinstance(start, fx.Node) or not isinstance(end, fx.Node):
        return None
    for weight, value, other in ((0, start, end), (1, end, start)):
        if _is_number(call["weight"], weight, constants) and _activated(other, root) is value:
            return Op(node, value, identity_meaning(lasts=False), _only_for(node, other))
    return None


def _lerp(input: Any, end: Any, weight: Any) -> Arguments:
    return locals()


def _read_mixture(node: fx.Node, root: nn.Module, constants: Constants) -> Op | None:
    """Read ``0 · activation(x) + scale · x`` as its second term."""
    if len(node.args) != 2 or node.kwargs or not all(isinstance(term, fx.Node) for term in node.args):
        return None
    for nothing, value in (node.args, node.args[::-1]):
        scaled = _factors(nothing, constants)  # type: ignore[arg-type]
        if scaled is None or not _is_number(scaled[1], 0, constants):
            continue
        origin = _factors(value, constants)  # type: ignore[arg-type]
        if _activated(scaled[0], root) is (value if origin is None else origin[0]):
            inner = _only_for(node, nothing, scaled[0])  # type: ignore[arg-type]
            return Op(node, value, identity_meaning(lasts=False), inner)  # type: ignore[arg-type]
    return None


def _factors(node: fx.Node, constants: Constants) -> tuple[fx.Node, Any] | None:
    """Return the node and the number that a product multiplies, or None if it is no such product."""
    if node.target not in PRODUCTS or len(node.args) != 2 or node.kwargs:
        return None
    for value, number in (node.args, node.args[::-1]):
        known = constants.number(number)
        is_one = isinstance(known, float) or (isinstance(known, Tensor) and known.ndim == 0)
        if isinstance(value, fx.Node) and is_one:
            return value, number
    return None


def _activated(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """Return the node whose value an activation changes number by number into a new tensor, or None if `node` is none."""
    if len(node.all_input_nodes) != 1 or mutated_by(node, root) is not None:
        return None
    if node.op == "call_module":
        known = type(called_by(root, node)) in ELEMENTWISE_LAYERS
    else:
        known = node.op in ("call_function", "call_method") and node.target in ELEMENTWISE
    return node.all_input_nodes[0] if known else None


def _only_for(node: fx.Node, *inner: fx.Node) -> tuple[fx.Node, ...]:
    """Return the nodes that nothing uses any more without `node`, the last one first."""
    found: list[fx.Node] = []
    for each in inner:
        if set(each.users) <= {node, *found}:
            found.append(each)
    return tuple(found)


def _is_number(value: Any, number: float, constants: Constants) -> bool:
    """Whether a value is a number that doesn't depend on the input, and this one."""
    found = constants.number(value)
    if isinstance(found, Tensor):
        return found.numel() == 1 and not found.is_meta and float(found) == number
    return found == number


_CALLS: dict[Any, tuple[Callable[..., Arguments], _Reader]] = {
    **dict.fromkeys(_ADDCMUL, (_addcmul, _read_addcmul)),
    **dict.fromkeys(_PRELU, (_prelu, _read_prelu)),
    **dict.fromkeys(_LERP, (_lerp, _read_lerp)),
}

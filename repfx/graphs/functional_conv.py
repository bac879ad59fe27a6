"""Convs written as function calls, such as ``F.conv2d(x, self.weight)``, that can each become a plain conv.

Their weight must be a parameter or depend on parameters alone. A conv class with a forward of its own, such as one that
standardizes its weight first, can become a plain conv, too, because tracing goes into it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra.kernel import Ints, Kernel
from repfx.algebra.layers import Layer, is_conv
from repfx.algebra.meaning import Meaning, named_padding
from repfx.graphs.aliasing import reads_only_the_form
from repfx.graphs.constants import CASTS, Constants, NotConstant, computed_from_parameters, holds, origins
from repfx.graphs.operations import Op
from repfx.records.module_tree import attribute, has


def _conv(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> None: ...


def _conv_transpose(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> None: ...


# dimensions and arguments of each function; `inspect` can't read the arguments from torch's functions
_FUNCTIONS: dict[Any, tuple[int, Callable[..., None]]] = {
    F.conv1d: (1, _conv),
    F.conv2d: (2, _conv),
    F.conv3d: (3, _conv),
    F.conv_transpose1d: (1, _conv_transpose),
    F.conv_transpose2d: (2, _conv_transpose),
    F.conv_transpose3d: (3, _conv_transpose),
}


def is_functional_conv(node: fx.Node) -> bool:
    """Whether a node calls one of torch's functions for convs on something that isn't computed from parameters alone.

    Such a function may also compute a weight from other weights.
    """
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return False
    given = _arguments(node)["input"]
    return isinstance(given, fx.Node) and not computed_from_parameters(given)


def read_functional_conv(node: fx.Node, constants: Constants) -> Op | str | None:
    """Read a functional conv with its current weight. Return the reason if it can't be read, and None for any other node."""
    if not is_functional_conv(node):
        return None
    dimensions, _ = _FUNCTIONS[node.target]
    call = _arguments(node)
    weight, bias = constants.tensor(call["weight"]), constants.tensor(call["bias"])
    if weight is None or weight.ndim != dimensions + 2 or (bias is None) is not (call["bias"] is None):
        return _why_unknown(call, constants)
    reason = _refusal_of_dtype(call["weight"], constants)
    if reason is not None:
        return reason
    try:
        sizes = {name: constants.literal(value) for name, value in call.items() if name in _SIZES}
        kernel = _kernel(weight, bias, transposed="output_padding" in call, **sizes)
    except (NotConstant, TypeError):  # a size that is computed from the input
        return _DEPENDS
    meaning = Meaning("conv", dimensions, kernel.in_channels, lambda like, channels, n: kernel.to(like))
    return Op(node, call["input"], meaning)


def tensors_of(node: fx.Node) -> list[str]:
    """Return the names of the tensors from which the weight and the bias of a functional conv are computed; none for other nodes."""
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return []
    call = _arguments(node)
    given = [call[name] for name in ("weight", "bias") if isinstance(call[name], fx.Node)]
    return sorted({str(source.target) for each in given for source in _parameters(each)})


_DEPENDS = "its weight or sizes depend on the input"
_SIZES = ("stride", "padding", "dilation", "groups", "output_padding")


def _arguments(node: fx.Node) -> dict[str, Any]:
    call = inspect.signature(_FUNCTIONS[node.target][1]).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    return call.arguments


def _kernel(
    weight: Tensor,
    bias: Tensor | None,
    *,
    transposed: bool,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any = 0,
) -> Kernel:
    strides, dilations = (_per_axis(size, weight.ndim - 2) for size in (stride, dilation))
    if isinstance(padding, str):
        sides = named_padding(padding, dilations, tuple(weight.shape[2:]))
    else:
        sides = tuple((side, side) for side in _per_axis(padding, weight.ndim - 2))
    if not transposed:
        return Kernel(weight, bias, strides, sides, dilations, groups)
    more = _per_axis(output_padding, weight.ndim - 2)
    return Kernel(weight, bias, strides, sides, dilations, groups, transposed=True, output_padding=more)


def _per_axis(size: Any, dimensions: int) -> Ints:
    """Return one size for each axis. torch's functions take a number or a sequence of one for all axes, or one number for each axis."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * dimensions if len(sizes) == 1 else sizes


def settings_of(node: fx.Node, root: nn.Module) -> Layer:
    """Return the settings that a plain conv takes over beside the kernel: dtype, device, whether it is trained and whether it has a bias.

    They are attributes of the result, under the names that they have on a conv.
    """
    call = _arguments(node)
    window = (1,) * _FUNCTIONS[node.target][0]
    return SimpleNamespace(
        weight=_settings_like(call["weight"], root), bias=call["bias"], padding=(), kernel_size=window
    )


def _settings_like(weight: fx.Node, root: nn.Module) -> Tensor:
    """Return an empty tensor with dtype and device of the parameters that a weight is computed from, and trained if one of them is."""
    found = [attribute(root, str(source.target)) for source in _parameters(weight)]
    floating = [tensor for tensor in found if isinstance(tensor, Tensor) and tensor.is_floating_point()]
    likest = next((tensor for tensor in floating if isinstance(tensor, nn.Parameter)), floating[0])
    return likest.detach().new_empty(0).requires_grad_(any(tensor.requires_grad for tensor in floating))


def _why_unknown(call: dict[str, Any], constants: Constants) -> str:
    """Return the reason why the weight or the bias of a call isn't known."""
    for name in ("weight", "bias"):
        try:
            constants.literal(call[name])
        except NotConstant as reason:
            alone = computed_from_parameters(call[name])
            return f"its {name} can't be computed from its parameters: {reason}" if alone else _DEPENDS
    return _DEPENDS


def _refusal_of_dtype(weight: fx.Node, constants: Constants) -> str | None:
    """Why a weight isn't read: it is complex on the way, rounded to fewer bits, or in another dtype than its parameters. Else None."""
    held = [constants.literal(source) for source in _parameters(weight)]
    if any(tensor.is_complex() for tensor in held):
        return "its weight is computed from complex numbers"
    if not any(tensor.is_floating_point() for tensor in held):
        return "its weight is computed from whole numbers alone"
    casts = [node for node in origins(weight) if node.op == "call_method" and node.target in CASTS]
    if not casts:
        return None
    own, forms = _settings_like(weight, constants.root).dtype, constants.forms
    for node in (weight, *casts):
        form, before = forms.of(node), forms.of(node.all_input_nodes[0])
        if form is None:
            return "its weight is cast to a dtype that isn't known"
        kept = form.dtype is own if node is weight else _keeps_numbers(form, before, own)
        if not kept:
            return f"its weight is cast to {form.dtype}, and its parameters are {own}"
    return None


def _keeps_numbers(after: Tensor, before: Tensor | None, own: torch.dtype) -> bool:
    """Whether a cast rounds no floating-point number to less than it has, or than parameters of the dtype `own` have."""
    if before is None or not (before.is_floating_point() and after.is_floating_point()):
        return before is not None
    return holds(after.dtype, before.dtype) or holds(after.dtype, own)


def is_shared(node: fx.Node) -> bool:
    """Whether another node of the graph reads the weight, or a parameter that the weight is computed from."""
    weight = _arguments(node)["weight"]
    own = set(origins(weight))
    names = {source.target for source in _parameters(weight)}
    readers = [
        user for other in node.graph.nodes if other.target in names and other.op == "get_attr" for user in other.users
    ]
    others = (user for user in readers if user not in own and user is not node)
    return not all(reads_only_the_form(user) or _leads_nowhere(user) for user in others)


def _leads_nowhere(node: fx.Node) -> bool:
    """Whether nothing is made of what a node computes, as if code has asked for its size alone."""
    computes = node.op in ("call_function", "call_method") and not node.is_impure()
    return computes and all(map(_leads_nowhere, node.users))


def reads_its_own_weight(node: fx.Node) -> bool:
    """Whether weight and bias are the parameters of the module whose code `node` is, as they are."""
    call, owner = _arguments(node), owner_of(node)
    return all(_is_attribute(call[name], f"{owner}.{name}".lstrip(".")) for name in ("weight", "bias"))


def _is_attribute(argument: fx.Node | None, path: str) -> bool:
    return argument is None or (argument.op == "get_attr" and argument.target == path)


def reads_saved_weight(node: fx.Node, root: nn.Module) -> bool:
    """Whether the weight is computed from a tensor that a state dict holds."""
    saved = root.state_dict(keep_vars=True).keys()
    return any(source.target in saved for source in _parameters(_arguments(node)["weight"]))


def _parameters(node: fx.Node) -> list[fx.Node]:
    """The parameters and buffers that a node is computed from."""
    return [source for source in origins(node) if source.op == "get_attr"]


def path_for(node: fx.Node, root: nn.Module, taken: Collection[str]) -> str:
    """Choose the path of the plain conv that replaces a functional one.

    It is the path of the conv module whose code `node` is, if that code calls no other functional conv and the path isn't taken.
    Otherwise it is a new path inside the module whose code calls the function.
    """
    owner = owner_of(node)
    alone = [other for other in node.graph.nodes if is_functional_conv(other) and owner_of(other) == owner] == [node]
    if owner and alone and owner not in taken and is_conv(root.get_submodule(owner)):
        return owner
    path, number = f"{owner}.{node.name}".lstrip("."), 0
    while path in taken or has(root, path):
        number += 1
        path = f"{owner}.{node.name}_{number}".lstrip(".")
    return path


def owner_of(node: fx.Node) -> str:
    """Return the path of the module whose code made a node."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""

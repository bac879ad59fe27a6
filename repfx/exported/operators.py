"""The ATen operators that mean a layer or a function of torch: one table, for core ATen and for the dialect of `torch.export.export`.

Operators are named as in ``aten.conv2d.default``, without ``aten``. So an operator that this version of torch lacks is no error.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import fx

from repfx.graphs.aliasing import written_by_schema
from repfx.graphs.written_strips import slice_between


def name_of(node: fx.Node) -> str:
    """Return the name of the ATen operator that a node calls, such as ``conv2d.default``; empty for any other node.

    >>> graph = fx.Graph()
    >>> name_of(graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),)))
    'relu.default'
    """
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return str(target).removeprefix("aten.")


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call of an ATen operator by name, with the defaults of those that aren't given."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    found = {argument.name: argument.default_value for argument in schema}
    found.update({argument.name: value for argument, value in zip(schema, node.args)})
    return {**found, **node.kwargs}


# ---- layers


@dataclass(frozen=True)
class ConvCall:
    """The arguments of a conv or a linear layer; `dimensions` is 0 for the latter, and `weight` may be a node that is transposed.

    Args:
        turned: whether the weight is that of the layer with its two axes swapped.
    """

    input: Any
    weight: Any
    bias: Any
    dimensions: int | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: Any = 1
    transposed: bool = False
    output_padding: Any = 0
    turned: bool = False


@dataclass(frozen=True)
class NormCall:
    """The arguments of a normalisation by running statistics. `by_batch` says that it takes the statistics of its input instead."""

    input: Any
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    eps: Any
    by_batch: bool
    several_outputs: bool


def conv_call(node: fx.Node) -> ConvCall | None:
    """Return the arguments of a conv or a linear layer, or None if a node calls neither."""
    name = name_of(node)
    if name not in _CONVS:
        return None
    dimensions, fixed = _CONVS[name]
    call = arguments_of(node)
    if any(call.get(factor, 1) != 1 for factor in ("alpha", "beta")):
        return None
    given = {field: call[field] for field in ConvCall.__dataclass_fields__ if field in call}
    renamed = _LINEAR[name](call) if name in _LINEAR else {}
    return ConvCall(**{"bias": None, **given, "dimensions": dimensions, **renamed, **fixed})


_CONVS: dict[str, tuple[int | None, dict[str, Any]]] = {
    **{f"conv{n}d.{overload}": (n, {}) for n in (1, 2, 3) for overload in ("default", "padding")},
    "conv_transpose1d.default": (1, {"transposed": True}),
    "conv_transpose2d.input": (2, {"transposed": True}),
    "conv_transpose3d.input": (3, {"transposed": True}),
    "convolution.default": (None, {}),
    "_convolution.default": (None, {}),
    "cudnn_convolution.default": (None, {}),
    "linear.default": (0, {}),
    "addmm.default": (0, {"turned": True}),
    "mm.default": (0, {"turned": True}),
}
_LINEAR: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "addmm.default": lambda call: {"input": call["mat1"], "weight": call["mat2"], "bias": call["self"]},
    "mm.default": lambda call: {"input": call["self"], "weight": call["mat2"]},
}


def norm_call(node: fx.Node) -> NormCall | None:
    """Return the arguments of a BatchNorm, or of an InstanceNorm that may use running statistics. Return None for any other node."""
    name = name_of(node)
    if name not in _NORMS:
        return None
    call = arguments_of(node)
    by_batch = call.get("training", call.get("use_input_stats", _NORMS[name].by_batch))
    tensors = {field: call.get(field) for field in ("input", "weight", "bias", "running_mean", "running_var")}
    eps = call["eps"] if "eps" in call else call["epsilon"]
    return NormCall(**tensors, eps=eps, by_batch=by_batch is not False, several_outputs=_NORMS[name].several_outputs)


@dataclass(frozen=True)
class _Norm:
    several_outputs: bool = True
    by_batch: bool = False  # unless an argument tells


_NORMS = {
    "batch_norm.default": _Norm(several_outputs=False),
    "instance_norm.default": _Norm(several_outputs=False),
    "cudnn_batch_norm.default": _Norm(),
    "miopen_batch_norm.default": _Norm(),
    "native_batch_norm.default": _Norm(),
    "_native_batch_norm_legit.default": _Norm(),
    "_native_batch_norm_legit.no_stats": _Norm(by_batch=True),
    "_native_batch_norm_legit_functional.default": _Norm(),
    "_native_batch_norm_legit_no_training.default": _Norm(),
    "_batch_norm_no_update.default": _Norm(),
    "_batch_norm_with_update.default": _Norm(by_batch=True),
    "_batch_norm_with_update_functional.default": _Norm(by_batch=True),
}


# ---- functions

TorchCall: TypeAlias = tuple[str, Any, tuple[Any, ...], dict[str, Any]]  # kind of node, target, arguments
_Rewrite: TypeAlias = Callable[[dict[str, Any], "int | None"], "TorchCall | None"]


def torch_call(node: fx.Node, axes: int | None) -> TorchCall | None:
    """Return the call of torch that means what a call of an ATen operator does, or None if none is known.

    Args:
        axes: number of axes of the input, or None if it isn't known.
    """
    name = name_of(node)
    if name in _SAME_ARGUMENTS:
        return "call_function", _SAME_ARGUMENTS[name], node.args, dict(node.kwargs)
    if name in _METHODS:
        return "call_method", _METHODS[name], node.args, dict(node.kwargs)
    rewrite = _REWRITES.get(name)
    return None if rewrite is None else rewrite(arguments_of(node), axes)


def replaced_whole(node: fx.Node) -> fx.Node | None:
    """Return the node that has all numbers of a slice over a whole axis, or of a write over a whole axis of a copy; None for others.

    A slice shares memory with that node. A write takes what it writes, which must be a tensor that nothing else reads.
    """
    name = name_of(node)
    if name not in ("slice.Tensor", "slice_scatter.default"):
        return None
    call = arguments_of(node)
    part = slice_between(call["start"], call["end"], call["step"])
    if part.start not in (None, 0) or part.stop is not None or part.step is not None:
        return None
    found = call["self" if name == "slice.Tensor" else "src"]
    if name == "slice_scatter.default" and (len(found.users) > 1 or name_of(found) not in _FUNCTIONAL_WRITES):
        return None
    return found if isinstance(found, fx.Node) else None


_FUNCTIONAL_WRITES = ("slice_scatter.default", "copy.default")


def _function(target: Any, *args: Any, **kwargs: Any) -> TorchCall:
    return "call_function", target, args, kwargs


def _handed_on(call: dict[str, Any]) -> TorchCall:
    """Return the call that hands its input on, or copies it, whatever its mode: a dropout of rate 0."""
    return _function(F.dropout, call.get("self", call.get("input")), 0.0, False)


def _dropout(call: dict[str, Any], axes: int | None) -> TorchCall | None:
    return _handed_on(call) if call["train"] is False or call["p"] == 0 else None


def _slice(call: dict[str, Any], axes: int | None) -> TorchCall | None:
    dim, start, end, step = (call[name] for name in ("dim", "start", "end", "step"))
    if axes is None or not all(isinstance(value, (int, type(None))) for value in (dim, start, end, step)):
        return None
    index = [slice(None)] * axes
    index[dim] = slice_between(start, end, step)
    return _function(operator.getitem, call["self"], tuple(index))


def _cast(call: dict[str, Any], axes: int | None) -> TorchCall | None:
    """Return a cast that changes the dtype alone."""
    others = {name: value for name, value in call.items() if name not in ("self", "dtype", "non_blocking", "copy")}
    if call["dtype"] is None or any(value is not None for value in others.values()):
        return None
    return "call_method", "to", (call["self"], call["dtype"]), {}


def _pad(mode: str) -> _Rewrite:
    return lambda call, axes: _function(F.pad, call["self"], call["padding"], mode)


def _upsample(mode: str) -> _Rewrite:
    def rewrite(call: dict[str, Any], axes: int | None) -> TorchCall:
        return _function(F.interpolate, call["input"], call["output_size"], call["scale_factors"], mode=mode)

    return rewrite


_SAME_ARGUMENTS: dict[str, Any] = {
    **{
        f"{name}.{kind}": getattr(torch, name) for name in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")
    },
    **{f"avg_pool{n}d.default": getattr(F, f"avg_pool{n}d") for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d.default": getattr(F, f"adaptive_avg_pool{n}d") for n in (1, 2, 3)},
    **{f"_adaptive_avg_pool{n}d.default": getattr(F, f"adaptive_avg_pool{n}d") for n in (2, 3)},
    **{f"{name}.default": getattr(torch, name) for name in ("relu", "sigmoid", "tanh", "neg", "prelu", "addcmul")},
    **{f"{name}.default": getattr(F, name) for name in ("gelu", "silu", "hardswish", "leaky_relu", "elu", "relu6")},
    "lerp.Scalar": torch.lerp,
    "lerp.Tensor": torch.lerp,
    "cat.default": torch.cat,
    "stack.default": torch.stack,
    "sum.dim_IntList": torch.sum,
    "mean.dim": torch.mean,
    "permute.default": torch.permute,
    "transpose.int": torch.transpose,
    "flatten.using_ints": torch.flatten,
    "clone.default": torch.clone,
    "pixel_shuffle.default": F.pixel_shuffle,
    "pixel_unshuffle.default": F.pixel_unshuffle,
    "channel_shuffle.default": F.channel_shuffle,
    "pad.default": F.pad,
    "slice_scatter.default": torch.slice_scatter,
}
_METHODS: dict[str, str] = {
    **{f"{name}_.{kind}": f"{name}_" for name in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")},
    "expand.default": "expand",
    "view.default": "reshape",
    "reshape.default": "reshape",
    "_unsafe_view.default": "reshape",
    "contiguous.default": "contiguous",
    "sym_size.int": "size",
    "repeat.default": "repeat",
    "copy_.default": "copy_",
    "fill_.Scalar": "fill_",
    "fill_.Tensor": "fill_",
}
_REWRITES: dict[str, _Rewrite] = {
    "constant_pad_nd.default": lambda call, axes: _function(
        F.pad, call["self"], call["pad"], "constant", call["value"]
    ),
    **{f"reflection_pad{n}d.default": _pad("reflect") for n in (1, 2, 3)},
    **{f"replication_pad{n}d.default": _pad("replicate") for n in (1, 2, 3)},
    "rsub.Scalar": lambda call, axes: (
        _function(operator.sub, call["other"], call["self"]) if call["alpha"] == 1 else None
    ),
    "t.default": lambda call, axes: _function(torch.transpose, call["self"], 0, 1) if axes == 2 else None,
    "einsum.default": lambda call, axes: _function(torch.einsum, call["equation"], *call["tensors"]),
    "slice.Tensor": _slice,
    "to.dtype": _cast,
    "_to_copy.default": _cast,
    "alias.default": lambda call, axes: _handed_on(call),
    "dropout.default": _dropout,
    "feature_dropout.default": _dropout,
    "alpha_dropout.default": _dropout,
    "upsample_nearest1d.vec": _upsample("nearest"),
    "upsample_nearest2d.vec": _upsample("nearest"),
    "upsample_nearest3d.vec": _upsample("nearest"),
    "upsample_linear1d.vec": _upsample("linear"),
    "upsample_bilinear2d.vec": _upsample("bilinear"),
    "upsample_trilinear3d.vec": _upsample("trilinear"),
    "upsample_bicubic2d.vec": _upsample("bicubic"),
}


# ---- memory


def tensors_written(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that a node changes: those that its operator's schema marks, and statistics that a BatchNorm updates."""
    norm = norm_call(node)
    statistics = [norm.running_mean, norm.running_var] if norm is not None and norm.by_batch else []
    return [*written_by_schema(node), *(each for each in statistics if isinstance(each, fx.Node))]

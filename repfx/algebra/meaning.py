"""Modules as linear maps: the exact class decides, never `isinstance` alone.

A subclass that overrides `forward` may do anything (timm's `Conv2dSame` pads by the input's size). So a module means what its class in
torch means only if it runs that class's own code. `refusal_of` says why a layer can't be read. timm's BatchNorms that also activate are
a case of their own (`repfx.algebra.activated_norm`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from repfx.algebra.arithmetic import full
from repfx.algebra.kernel import Ints, Kernel, Padding
from repfx.algebra.layers import (
    ACTIVATED_BATCH_NORMS,
    BATCH_NORMS,
    CODE,
    CONVS,
    TRANSPOSED_CONVS,
    Layer,
    has_hooks,
    is_batch_norm,
    is_conv_or_linear,
    is_frozen_norm,
    is_patched,
    qualified_name,
)
from repfx.errors import InvalidInput

Kind: TypeAlias = Literal["conv", "affine", "pool", "pad", "crop", "subsample", "slice", "identity"]
Build: TypeAlias = Callable[[Any, int, int], Kernel]
Reader: TypeAlias = Callable[[nn.Module], "Meaning | None"]


_READERS: dict[type[nn.Module], Reader] = {}


@dataclass(frozen=True)
class Meaning:
    """One linear map, before its kernel is built.

    Args:
        kind: ``conv`` (linear layers too), ``affine`` per channel, ``pool``, ``pad``, ``crop``, ``subsample``, ``slice`` of channels or
            ``identity``.
        dimensions: number of spatial axes, 0 for a linear layer; None if any number fits.
        in_channels: number of input channels; None if any number fits.
        build: `build(like, channels, dimensions)` returns the kernel in the dtype and on the device of `like`; a conv's own for None.
        lasts: whether the module stays such a map while a model trains. A dropout of rate 0 and a slope of 1 may change.
    """

    kind: Kind
    dimensions: int | None
    in_channels: int | None
    build: Build
    lasts: bool = True


def reads(*classes: type[nn.Module]) -> Callable[[Reader], Reader]:
    """Register how modules of exactly these classes are read."""

    def register(reader: Reader) -> Reader:
        _READERS.update(dict.fromkeys(classes, reader))
        return reader

    return register


def torch_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the registered class whose own code `module` runs, or None.

    >>> class Renamed(nn.Conv2d): ...
    >>> class Other(nn.Conv2d):
    ...     def forward(self, x): return x
    >>> torch_class(Renamed(1, 1, 1)), torch_class(Other(1, 1, 1))
    (<class 'torch.nn.modules.conv.Conv2d'>, None)
    """
    bases = [base for base in type(module).__mro__ if base in _READERS]
    if not bases or is_patched(module):
        return None
    known = bases[0]
    own_code = all(getattr(type(module), name, None) is getattr(known, name, None) for name in CODE)
    return known if own_code else None


def meaning_of(module: nn.Module) -> Meaning | None:
    """Return the linear map that `module` is in eval mode, or None. `refusal_of` says why a conv or BatchNorm can't be read."""
    if refusal_of(module) is not None:
        return None
    if is_frozen_norm(module):
        return _read_batch_norm(module)
    if qualified_name(module) in _DROPS_OF_OTHERS and not is_patched(module):
        return _read_drop(module)
    known = torch_class(module)
    return None if known is None else _READERS[known](module)


def _unchecked_meaning(module: nn.Module) -> Meaning | None:
    """Return the meaning of a module without the checks that `torch.compile` can't trace, such as those for hooks and patches.

    Only for modules that `meaning_of` has accepted.
    """
    if is_frozen_norm(module):
        return _read_batch_norm(module)
    known = [base for base in type(module).__mro__ if base in _READERS]
    if not known or type(module).forward is not known[0].forward:
        return None
    return _READERS[known[0]](module)


def kernel_of(module: nn.Module, like: Tensor, channels: int, dimensions: int) -> Kernel:
    """Return the kernel of a linear module for inputs of `channels` channels and `dimensions` axes, in the dtype of `like`.

    Raises:
        InvalidInput: the module is no linear map.
    """
    compiling = torch.compiler.is_compiling()
    meaning = _unchecked_meaning(module) if compiling else meaning_of(module)
    if meaning is None:
        why = None if compiling else refusal_of(module)
        raise InvalidInput(f"{type(module).__name__} is no linear map: {why or 'its class is not known'}.")
    return meaning.build(like, channels, dimensions)


def refusal_of(module: Layer) -> str | None:
    """Why a conv, linear layer or BatchNorm can't be read; None if it can be, and for all other modules."""
    if not (is_conv_or_linear(module) or is_batch_norm(module)):
        return None
    name = type(module).__name__
    own_tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any(is_lazy(tensor) for tensor in own_tensors):
        return f"{name} is lazy and not initialized yet: run the model once"
    if has_hooks(module):
        return f"{name} has hooks, which would no longer see what they see now"
    if is_patched(module) if is_frozen_norm(module) else torch_class(module) is None:
        return f"{name} runs code of its own, not {_nearest(module)}'s"
    other = next((tensor.dtype for tensor in module.parameters(recurse=False) if not tensor.is_floating_point()), None)
    if other is not None:
        return f"{name} has weights in {other}"
    if is_batch_norm(module) and module.running_mean is None:
        return f"{name} keeps no running statistics, so it isn't a fixed map even in eval mode"
    return None


def _nearest(module: nn.Module) -> str:
    if qualified_name(module) in ACTIVATED_BATCH_NORMS:
        return ACTIVATED_BATCH_NORMS[qualified_name(module)].rpartition(".")[2]
    return next((base for base in type(module).__mro__ if base in _READERS), type(module)).__name__


def padding_of(conv: Layer) -> Padding:
    """Return the padding of a conv module, (before, after) per axis; `padding="same"` is resolved as in torch."""
    if isinstance(conv.padding, str):
        return named_padding(conv.padding, conv.dilation, conv.kernel_size)
    return tuple((p, p) for p in conv.padding)


def named_padding(name: str, dilation: Ints, window: Ints) -> Padding:
    """Return the padding that torch's ``"same"`` or ``"valid"`` amounts to, (before, after) per axis.

    >>> named_padding("same", (1, 2), (4, 3))
    ((1, 2), (2, 2))
    """
    totals = [d * (k - 1) if name == "same" else 0 for d, k in zip(dilation, window)]
    return tuple((total // 2, total - total // 2) for total in totals)


def affine_of(norm: Layer, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scale, shift), each ``(channels,)``, of a norm with running statistics in eval mode: s = γ / √(σ² + ε) and β - μ·s."""
    if like.is_meta:  # there are no numbers to compute
        return like.new_empty(norm.running_mean.shape), like.new_empty(norm.running_mean.shape)
    mean, variance = norm.running_mean.to(like), norm.running_var.to(like)
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(like)
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.to(like)


@reads(*CONVS)
def _read_conv(conv: Layer) -> Meaning:
    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        bias = None if conv.bias is None else conv.bias.to(like)
        sizes = (conv.stride, padding_of(conv), conv.dilation, conv.groups, conv.padding_mode)
        return Kernel(conv.weight.to(like), bias, *sizes)

    return Meaning("conv", len(conv.kernel_size), conv.in_channels, build)


@reads(*TRANSPOSED_CONVS)
def _read_transposed_conv(conv: Layer) -> Meaning:
    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        bias = None if conv.bias is None else conv.bias.to(like)
        sizes = (conv.stride, padding_of(conv), conv.dilation, conv.groups)
        return Kernel(conv.weight.to(like), bias, *sizes, transposed=True, output_padding=tuple(conv.output_padding))

    return Meaning("conv", len(conv.kernel_size), conv.in_channels, build)


@reads(nn.Linear)
def _read_linear(linear: Layer) -> Meaning:
    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        bias = None if linear.bias is None else linear.bias.to(like)
        return Kernel(linear.weight.to(like), bias, (), (), ())

    return Meaning("conv", 0, linear.in_features, build)


@reads(*BATCH_NORMS)
def _read_batch_norm(norm: Layer) -> Meaning:
    return _read_affine(norm, 2 if is_frozen_norm(norm) else _BATCH_NORM_DIMENSIONS[torch_class(norm)])


def _read_affine(norm: Layer, dimensions: int | None) -> Meaning:
    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        return Kernel.diagonal(*affine_of(norm, like), dimensions)

    return Meaning("affine", dimensions, norm.running_mean.shape[0], build)


# BatchNorm1d takes (batch, channels) and (batch, channels, length); SyncBatchNorm takes anything
_BATCH_NORM_DIMENSIONS: dict[type[nn.Module] | None, int | None] = {
    nn.BatchNorm1d: None,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.SyncBatchNorm: None,
}


_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@reads(*_INSTANCE_NORMS)
def _read_instance_norm(norm: Layer) -> Meaning | None:
    """Read an InstanceNorm that takes running statistics in eval mode. In training mode it is no fixed map."""
    if not norm.track_running_stats or norm.running_mean is None or is_lazy(norm.running_mean):
        return None
    dimensions = next(n for n, kind in enumerate(_INSTANCE_NORMS, 1) if isinstance(norm, kind))
    return replace(_read_affine(norm, dimensions), lasts=False)


def identity_meaning(*, lasts: bool = True) -> Meaning:
    """Return the map that hands its input on."""

    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        return Kernel.identity(like, channels=channels, dimensions=dimensions)

    return Meaning("identity", None, None, build, lasts)


@reads(nn.Identity)
def _read_identity(module: nn.Module) -> Meaning:
    return identity_meaning()


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

# classes of other packages that drop, and the attributes that hold their rates
_DROPS_OF_OTHERS = {
    "timm.layers.drop.DropPath": "drop_prob",
    "torchvision.ops.stochastic_depth.StochasticDepth": "p",
}


def drop_rate(module: Layer) -> object | None:
    """Return the rate of a layer that drops values or paths, or None for any other module."""
    name = _DROPS_OF_OTHERS.get(qualified_name(module), "p" if isinstance(module, _DROPOUTS) else "")
    return getattr(module, name) if name else None


@reads(*_DROPOUTS)
def _read_drop(drop: Layer) -> Meaning | None:
    """Read a layer that drops nothing. Any other one stays, so that a fused model can be trained with it."""
    return identity_meaning(lasts=False) if is_exactly(drop_rate(drop), 0) else None


@reads(nn.LeakyReLU)
def _read_leaky_relu(activation: Layer) -> Meaning | None:
    return identity_meaning(lasts=False) if is_exactly(activation.negative_slope, 1) else None


@reads(nn.PReLU)
def _read_prelu(activation: Layer) -> Meaning | None:
    """Read a PReLU whose slopes are all 1. Nothing is known of weights without numbers."""
    slopes = activation.weight
    return None if slopes.is_meta or bool((slopes != 1).any()) else identity_meaning(lasts=False)


def is_exactly(value: object, number: float) -> bool:
    """Whether a value is a plain number, and this one."""
    return isinstance(value, (int, float)) and value == number


_AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


@reads(*_AVERAGE_POOLS)
def _read_average_pool(pool: Layer) -> Meaning | None:
    dimensions = next(n for n, kind in enumerate(_AVERAGE_POOLS, 1) if isinstance(pool, kind))
    kernel_size, stride, padding = (
        per_axis(size, dimensions) for size in (pool.kernel_size, pool.stride, pool.padding)
    )
    if pool.ceil_mode or (any(padding) and not pool.count_include_pad):
        return None  # the window shrinks at the border
    return average_pool_meaning(dimensions, kernel_size, stride, padding, getattr(pool, "divisor_override", None))


def average_pool_meaning(
    dimensions: int, kernel_size: Ints, stride: Ints, padding: Ints, area: int | None = None
) -> Meaning:
    """Return the map of an average pool."""

    def build(like: Tensor, channels: int, _: int) -> Kernel:
        pairs = tuple((p, p) for p in padding)
        return Kernel.average_pool(
            like,
            channels=channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=pairs,
            area=area or math.prod(kernel_size),
        )

    return Meaning("pool", dimensions, None, build)


def pad_meaning(padding: Padding, mode: str) -> Meaning:
    """Return the map of a padding: the identity with padding. Its kind is ``crop`` if it only leaves positions out."""

    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        ones = (1,) * dimensions
        weight = full(like, (channels, 1, *ones), 1.0)
        return Kernel(weight, None, ones, padding, ones, groups=channels, padding_mode=mode)

    kind: Kind = "crop" if all(side <= 0 for pair in padding for side in pair) else "pad"
    return Meaning(kind, len(padding), None, build)


def subsampling_meaning(stride: Ints) -> Meaning:
    """Return the map that keeps every s-th position along each axis: the identity with a stride."""

    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        return replace(Kernel.identity(like, channels=channels, dimensions=len(stride)), stride=stride)

    return Meaning("subsample", len(stride), None, build)


def per_axis(value: int | tuple[int, ...], dimensions: int) -> Ints:
    """Return one number for each axis, from the number or the tuple that a torch module holds."""
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


_PADS = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


@reads(*(cls for classes in _PADS.values() for cls in classes))
def _read_pad(module: Layer) -> Meaning | None:
    mode = next(mode for mode, classes in _PADS.items() if torch_class(module) in classes)
    padding = pairs_of(module.padding)
    if wraps_the_rest(padding, mode) or getattr(module, "value", 0) != 0:
        return None
    return pad_meaning(padding, mode)


def wraps_the_rest(padding: Padding, mode: str) -> bool:
    """Whether torch crops one side and fills the other with what is left. A kernel would pad before it crops."""
    return mode == "circular" and any(min(pair) < 0 < max(pair) for pair in padding)


def pairs_of(sides: tuple[int, ...]) -> Padding:
    """Return torch's flat padding, which has the last axis first, as (before, after) per axis."""
    return tuple((sides[i], sides[i + 1]) for i in range(len(sides) - 2, -1, -2))

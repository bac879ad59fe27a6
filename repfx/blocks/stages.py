"""The modules that blocks are made of, beside torch's own: padding of any sign, scales, and the normalisation of a branch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from repfx.algebra.assembly import in_full
from repfx.algebra.baking import conv_module
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Ints, Kernel, Padding, is_symmetric, pad, subsample
from repfx.algebra.layers import BATCH_NORMS, Layer, is_batch_norm
from repfx.algebra.meaning import (
    Meaning,
    affine_of,
    kernel_of,
    pad_meaning,
    reads,
    refusal_of,
    subsampling_meaning,
    torch_class,
)
from repfx.algebra.torch_faults import may_corrupt_memory
from repfx.blocks.windows.covariance import WindowCovariance
from repfx.errors import InvalidInput

BATCH_NORM_OF: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
AVERAGE_POOL_OF: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}

Stages = Iterator[tuple[str, nn.Module]]


class RowNorm(nn.Module):
    """A BatchNorm of the last axis: it takes each position of ``(…, channels)`` for a row of a batch ``(rows, channels)``.

    torch's own BatchNorms have the channels on the second axis, and a linear layer has them on the last.

    Args:
        norm: BatchNorm1d or SyncBatchNorm of the rows.

    >>> RowNorm(nn.BatchNorm1d(4))(torch.randn(2, 3, 5, 4)).shape
    torch.Size([2, 3, 5, 4])
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.reshape(-1, x.shape[-1]))
        return normed.reshape(x.shape)


@reads(RowNorm)
def _read_row_norm(rows: Layer) -> Meaning | None:
    if not is_batch_norm(rows.norm) or refusal_of(rows.norm) is not None:
        return None

    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        return Kernel.diagonal(*affine_of(rows.norm, like), dimensions)

    return Meaning("affine", 0, rows.norm.running_mean.shape[0], build)


def batch_norm_in(stage: Layer | None) -> Layer | None:
    """Return the BatchNorm that a stage of a branch is, or that normalises rows in it; else None."""
    norm = stage.norm if isinstance(stage, RowNorm) else stage
    return norm if norm is not None and is_batch_norm(norm) else None


class Pad(nn.Module):
    """Padding by (before, after) per axis, in any of torch's padding modes. Negative numbers crop.

    >>> Pad(((-1, 1),))(torch.arange(3.0))
    tensor([1., 2., 0.])
    """

    def __init__(self, padding: Padding, mode: str = "zeros") -> None:
        super().__init__()
        self.padding = padding
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return pad(x, self.padding, self.mode)

    def extra_repr(self) -> str:
        return f"{self.padding}, {self.mode!r}"


@reads(Pad)
def _read_pad(module: Layer) -> Meaning:
    return pad_meaning(module.padding, module.mode)


class Subsample(nn.Module):
    """Every s-th position along each axis, from the first one on, as a view. An unstrided 1×1 conv behind it is a strided one.

    >>> Subsample((2,))(torch.arange(5.0))
    tensor([0., 2., 4.])
    """

    def __init__(self, stride: Ints) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return subsample(x, self.stride)

    def extra_repr(self) -> str:
        return str(self.stride)


@reads(Subsample)
def _read_subsample(module: Layer) -> Meaning:
    return subsampling_meaning(module.stride)


class Scale(nn.Module):
    """One learned factor per channel, and with `bias` one learned summand: ``(batch, channels, *axes)`` times ``(channels,)``.

    With 0 axes the channels are on the last axis, as those of a linear layer are.

    >>> Scale(2, 1, bias=True)(torch.ones(1, 2, 3)).shape
    torch.Size([1, 2, 3])
    """

    def __init__(self, channels: int, dimensions: int, *, bias: bool = False, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, **factory))
        self.bias = nn.Parameter(torch.zeros(channels, **factory)) if bias else None
        self.dimensions = dimensions

    @classmethod
    def like(cls, conv: Layer, value: float) -> Scale:
        """Make a `Scale` for the output of a conv, with all factors equal to `value` at first."""
        site = ConvSpec.of(conv)
        scale = cls(site.out_channels, site.dimensions, device=conv.weight.device, dtype=conv.weight.dtype)
        nn.init.constant_(scale.weight, value)
        scale.weight.requires_grad_(conv.weight.requires_grad)
        return scale.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        ones = (1,) * self.dimensions
        scaled = x * self.weight.reshape(-1, *ones)
        return scaled if self.bias is None else scaled + self.bias.reshape(-1, *ones)

    def extra_repr(self) -> str:
        return str(self.weight.shape[0])


@reads(Scale)
def _read_scale(scale: Layer) -> Meaning:
    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        bias = None if scale.bias is None else scale.bias.to(like)
        return Kernel.diagonal(scale.weight.to(like), bias, dimensions)

    return Meaning("affine", scale.dimensions, scale.weight.shape[0], build)


class _Read:
    """A module that another one reads and never runs, and that isn't among its children.

    In a plain attribute or a container it would look like one that code may run, and would then have to stay what it is.
    """

    def __init__(self, module: Layer) -> None:
        self.module = module


class TrackedNorm(Scale):
    """A learned factor over the standard deviation of what the stages before it output: γ / √(σ² + ε) per channel, without a mean.

    σ² follows from the kernel of these stages and the covariance of the block's input windows. So it is a differentiable function of the
    weights, and takes nothing from the batch at hand. At the end of a path the factor counts in units of the site's own conv.

    Args:
        channels, dimensions: sizes of the input.
        windows: the covariance, and ε.
        last: whether the norm stands at the end of its path.
    """

    def __init__(
        self, channels: int, dimensions: int, windows: WindowCovariance, *, last: bool, **factory: Any
    ) -> None:
        super().__init__(channels, dimensions, **factory)
        self.last = last
        self._windows = _Read(windows)
        self._chain = _Read(None)

    @property
    def windows(self) -> WindowCovariance:
        """The covariance, which is a child of the block."""
        found: WindowCovariance = self._windows.module
        return found

    def follow(self, chain: Layer) -> None:
        """Take the norm for a stage of this chain."""
        self._chain = _Read(chain)

    def kernels_before(self, like: Tensor) -> list[Kernel]:
        """Return kernels that compose to that of the stages before the norm; differentiable."""
        found: list[Kernel] = self._chain.module.kernels(like, before=self)
        return found

    def applied(self, kernels: Sequence[Kernel]) -> list[Kernel]:
        """Return maps one after another that compose to the given ones and this norm; differentiable."""
        first, *others = self._taken_together(kernels)
        return [first.fold_affine(self._factor([first, *others])), *others]

    def factor(self, kernels: Sequence[Kernel]) -> Tensor:
        """Return the factor of each channel behind maps one after another; differentiable."""
        return self._factor(self._taken_together(kernels))

    def set_unit(self, kernel: Kernel) -> None:
        """Set γ so that the factor behind a kernel is 1, or -1 where γ is negative now."""
        deviation = self._deviation([kernel])
        self.weight.copy_(torch.where(self.weight < 0, -deviation, deviation) / self.windows.unit.to(deviation))

    def _taken_together(self, kernels: Sequence[Kernel]) -> list[Kernel]:
        """Return the maps as one, or as a 1×1 and the mean over the window, whose order makes no difference to a factor."""
        stages = list(self._chain.module)
        averages = isinstance(stages[stages.index(self) - 1], tuple(AVERAGE_POOL_OF.values()))
        if averages and len(kernels) == 2 and math.prod(kernels[0].kernel_size) == 1:
            return list(kernels)
        return [reduce(Kernel.compose, kernels)]

    def _factor(self, kernels: Sequence[Kernel]) -> Tensor:
        deviation = self._deviation(kernels)
        factor = self.weight.to(deviation) / deviation
        factor = factor * self.windows.unit.to(deviation) if self.last else factor
        return factor.to(kernels[0].weight.dtype)

    def _deviation(self, kernels: Sequence[Kernel]) -> Tensor:
        """Return √(σ² + ε), ``(channels,)``, in float32 or finer; differentiable."""
        windows = self.windows
        variance = windows.variance(kernels[0]) if len(kernels) == 1 else windows.variance_of_mean(kernels[0])
        return (variance + windows.eps).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        with in_full(self.weight):
            factor = self.factor(self.kernels_before(self.weight))
        return x * factor.to(x.dtype).reshape(-1, *(1,) * self.dimensions)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise InvalidInput(
            'norm="tracked" reads the weights of the stages before it, and its replica would read those of the original, which lie on '
            "another device; use DistributedDataParallel instead of DataParallel."
        )


@reads(TrackedNorm)
def _read_tracked_norm(norm: Layer) -> Meaning:
    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        return Kernel.diagonal(norm.factor(norm.kernels_before(like)), None, dimensions)

    return Meaning("affine", norm.dimensions, norm.weight.shape[0], build, lasts=False)


class Factor(nn.Module):
    """One fixed number that multiplies every channel.

    >>> Factor(0.5)(torch.tensor([2.0]))
    tensor([1.])
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value

    def extra_repr(self) -> str:
        return f"{self.value:g}"


@reads(Factor)
def _read_factor(factor: Layer) -> Meaning:
    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        return Kernel.diagonal(like.new_full((channels,), factor.value), None, dimensions)

    return Meaning("affine", None, None, build)


class Residual(nn.Module):
    """The sum ``x + conv(x)``, for a 1×1 conv with as many output as input channels."""

    def __init__(self, conv: Layer) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.conv(x)
        return found

    def equivalent_kernel(self, like: Tensor) -> Kernel:
        """Return the kernel of the sum; differentiable."""
        site = ConvSpec.of(self.conv)
        identity = Kernel.identity(like, channels=site.in_channels, dimensions=site.dimensions)
        return kernel_of(self.conv, like, site.in_channels, site.dimensions).add(identity)


class AttachRate(nn.Module):
    """The factor λ of a block's branches, one buffer for all channels (RepAn, eq. 3).

    Args:
        value: first value of λ, from 0, with which the branches add nothing, to 1.
        channels, dimensions: channels and number of axes of the input, ``(batch, channels, *axes)``.
        like: tensor that gives dtype and device.
    """

    rate: Tensor

    def __init__(self, value: float, channels: int, dimensions: int, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(value, dtype=like.dtype, device=like.device))
        self.channels = channels
        self.dimensions = dimensions

    def factor(self) -> Tensor:
        """Return λ."""
        return self.rate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.rate

    def kernel(self, like: Tensor) -> Kernel:
        """Return the factor as a kernel; differentiable."""
        return Kernel.diagonal(self.rate.to(like).expand(self.channels), None, self.dimensions)


@reads(AttachRate)
def _read_attach_rate(attach: Layer) -> Meaning:
    return Meaning("affine", attach.dimensions, attach.channels, lambda like, channels, dimensions: attach.kernel(like))


@dataclass(frozen=True)
class Norm:
    """The normalisation of a branch's outputs.

    Args:
        kind: value of `Spec.norm`.
        eps, momentum: settings of the branch's BatchNorms.
        synchronized: whether they are SyncBatchNorms.
        frozen: class of a BatchNorm whose numbers are never trained; None for torch's own.
        windows: the covariance of the site's windows, for ``tracked``.
    """

    kind: str = "batch_norm"
    eps: float = 1e-5
    momentum: float | None = 0.1
    synchronized: bool = False
    frozen: type[nn.Module] | None = None
    windows: WindowCovariance | None = None

    @property
    def normalises(self) -> bool:
        """Whether what the convs of a branch output is brought to one scale, so that a bias or scale of their own would be lost."""
        return self.kind in ("batch_norm", "tracked")

    @classmethod
    def like(cls, kind: str, norm: Layer | None) -> Norm:
        """Make a normalisation with the settings of `norm`; with the default ones unless `norm` is one of torch's BatchNorms."""
        if norm is None or torch_class(norm) not in BATCH_NORMS:
            return cls(kind)
        return cls(kind, norm.eps, norm.momentum, isinstance(norm, nn.SyncBatchNorm))

    def batch_norm(self, channels: int, dimensions: int, like: Tensor) -> nn.Module:
        """Make a BatchNorm for `channels`, on the device and in the dtype of `like`; behind a linear layer, one of the last axis."""
        if self.frozen is not None:
            return self.frozen(channels, self.eps).to(like.device, like.dtype)
        kind = nn.SyncBatchNorm if self.synchronized else BATCH_NORM_OF[dimensions or 1]
        norm = kind(channels, self.eps, self.momentum, device=like.device, dtype=like.dtype)
        return norm if dimensions else RowNorm(norm)

    def inside(self, name: str, channels: int, dimensions: int, like: Tensor) -> Stages:
        """Yield the normalisation between the convs of a branch: a BatchNorm, a `TrackedNorm`, or nothing."""
        if self.kind == "batch_norm":
            yield name, self.batch_norm(channels, dimensions, like)
        if self.kind == "tracked":
            yield name, self.tracked(channels, dimensions, like, last=name == "norm")

    def tracked(self, channels: int, dimensions: int, like: Tensor, *, last: bool) -> TrackedNorm:
        """Make a norm that divides by tracked deviations."""
        if self.windows is None:
            raise InvalidInput('norm="tracked" needs the covariance of the windows of a block.')
        factory = {"device": like.device, "dtype": like.dtype}
        return TrackedNorm(channels, dimensions, self.windows, last=last, **factory)

    def last(self, channels: int, dimensions: int, like: Tensor) -> Stages:
        """Yield the normalisation at the end of a branch: a `Scale`, a BatchNorm, a `TrackedNorm`, or nothing."""
        if self.kind == "scale":
            yield "scale", Scale(channels, dimensions, device=like.device, dtype=like.dtype)
        yield from self.inside("norm", channels, dimensions, like)


def conv_stages(name: str, spec: ConvSpec, like: Tensor, *, bias: bool = False) -> Stages:
    """Yield a conv of these sizes, after a `Pad` if torch's conv can't apply the padding itself.

    A strided 1×1 conv of few channels is a `Subsample` and an unstrided conv: see `repfx.algebra.torch_faults`.
    """
    padded = is_symmetric(spec.padding)
    if not padded:
        yield f"{name}_pad", Pad(spec.padding, spec.padding_mode)
        spec = replace(spec, padding=((0, 0),) * spec.dimensions)
    if not spec.transposed and may_corrupt_memory(
        spec.in_channels, spec.kernel_size, spec.stride, chain(*spec.padding)
    ):
        yield f"{name}_subsample", Subsample(spec.stride)
        spec = replace(spec, stride=(1,) * spec.dimensions)
    yield name, conv_module(spec, like, bias=bias)


def _fan_out(conv: Layer) -> None:
    """Draw weights from N(0, √(2 / (window · out))), as DyRep does."""
    site = ConvSpec.of(conv)
    nn.init.normal_(conv.weight, 0.0, math.sqrt(2 / (math.prod(site.kernel_size) * site.out_channels)))


def _small(conv: Layer) -> None:
    """Draw weights from U(-0.1 / √out, 0.1 / √out), as RepAn does."""
    limit = 0.1 / math.sqrt(ConvSpec.of(conv).out_channels)
    nn.init.uniform_(conv.weight, -limit, limit)


FIRST_WEIGHTS: dict[str, Callable[[Layer], object]] = {
    "default": lambda conv: None,  # torch has drawn the weights
    "fan_out": _fan_out,
    "small": _small,
    "shared": lambda conv: None,  # convs that can't share keep torch's weights
}

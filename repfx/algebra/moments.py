"""`Moments`: mean and variance of a linear map's output, per channel. They turn a kernel into a conv and the BatchNorm behind it.

In training mode the output of a BatchNorm has mean β and variance γ², whatever the input is. So if the moments of a map's output are
known, a conv and a BatchNorm can replace the map in both modes. With W and b the kernel, m and v the moments of its output:

    conv weight W, no bias;   μ = m - b,   σ² = v,   γ = √(v + ε),   β = m.

A channel whose γ was negative keeps a negative γ, with -W and -μ.

In eval mode this is W·x + b exactly, whatever m and v are. In training mode it is as accurate as they are. Nothing is divided by γ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance over batch and positions, both ``(channels,)``.

    >>> norm = nn.BatchNorm2d(1)
    >>> both = Moments.after(norm).add(Moments.after(norm))
    >>> both.mean.tolist(), [round(variance, 3) for variance in both.variance.tolist()]
    ([0.0], [2.0])
    """

    mean: Tensor
    variance: Tensor

    @classmethod
    def after(cls, norm: Layer) -> Moments:
        """Return the moments of a BatchNorm's output in training mode: β and γ² · σ² / (σ² + ε).

        The variance is near γ² unless the channel hardly varies.
        """
        like = norm.running_mean
        gamma = torch.ones_like(like) if norm.weight is None else norm.weight.detach()
        beta = torch.zeros_like(like) if norm.bias is None else norm.bias.detach()
        return cls(beta.to(torch.float64, copy=True), gamma.double().square() * _share_of_variance(norm))

    @classmethod
    def before(cls, norm: Layer) -> Moments:
        """Return the moments of what a BatchNorm is given, as its running statistics tell them."""
        return cls(norm.running_mean.to(torch.float64, copy=True), norm.running_var.to(torch.float64, copy=True))

    @classmethod
    def unknown(cls, kernel: Kernel) -> Moments:
        """Return moments for a map of which nothing but the kernel is known: its bias as the mean, and a variance of 1."""
        bias = _bias_of(kernel).double()
        return cls(bias, torch.ones_like(bias))

    def add(self, other: Moments) -> Moments:
        """Return the moments of a sum. Means add exactly, variances as if the terms were uncorrelated."""
        return Moments(self.mean + other.mean, self.variance + other.variance)

    def affine(self, scale: Tensor, shift: Tensor | None) -> Moments:
        """Return the moments of scale · y + shift, for a y with these moments."""
        mean = self.mean * scale
        return Moments(mean if shift is None else mean + shift, self.variance * scale.square())


def _share_of_variance(norm: Layer) -> Tensor:
    variance: Tensor = norm.running_var.double()
    share: Tensor = variance / (variance + norm.eps)
    return share


@torch.no_grad()
def set_kernel(conv: Layer, norm: Layer | None, kernel: Kernel, moments: Moments | None) -> None:
    """Write a kernel into a conv and the BatchNorm behind it, in place. The parameters stay the same objects.

    If there is no BatchNorm, the bias goes to the conv, which gets one if it had none.
    """
    bias = _bias_of(kernel)
    if norm is not None and norm.weight is None:
        _set_with_plain_norm(conv, norm, kernel.weight, bias)
        return
    if norm is None:
        conv.weight.copy_(kernel.weight)
        if conv.bias is not None:
            conv.bias.copy_(bias)
        elif kernel.bias is not None:
            conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=conv.weight.requires_grad)
        return
    sign = signs_of(norm)  # kept, so that the momentum of the weights still points their way
    conv.weight.copy_(kernel.weight if kernel.transposed else kernel.weight * _along(sign, kernel.weight))
    if kernel.transposed:
        sign = torch.ones_like(sign)
    set_norm(norm, moments or Moments.unknown(kernel), sign, bias)
    if conv.bias is not None:
        conv.bias.zero_()


def _set_with_plain_norm(conv: Layer, norm: Layer, weight: Tensor, bias: Tensor) -> None:
    """Write a kernel into a conv and a BatchNorm that has no γ, and so outputs variance 1 in training mode."""
    norm.running_var.fill_(1 - norm.eps)
    deviation = (norm.running_var[0].double() + norm.eps).sqrt()  # 1, but for rounding
    conv.weight.copy_(weight * deviation)
    norm.running_mean.copy_(-bias * deviation)
    if conv.bias is not None:
        conv.bias.zero_()


def signs_of(norm: Layer) -> Tensor:
    """Return the sign of each γ of a BatchNorm, in float64: -1, or 1."""
    return torch.where(norm.weight < 0, -1.0, 1.0).double()


@torch.no_grad()
def set_norm(norm: Layer, moments: Moments, sign: Tensor, bias: Tensor | None = None) -> None:
    """Give a BatchNorm the numbers with which it computes ``sign · y + bias`` in eval mode, and outputs `moments` in training mode."""
    mean, variance = moments.mean.to(sign.device), moments.variance.to(sign.device)
    if norm.bias is None:
        mean = torch.zeros_like(mean)
    norm.running_mean.copy_(sign * (mean if bias is None else mean - bias))
    norm.running_var.copy_(variance)
    # from the rounded variance, so that √(σ² + ε) in eval mode cancels γ to the last digit
    norm.weight.copy_(sign * (norm.running_var.double() + norm.eps).sqrt())
    if norm.bias is not None:
        norm.bias.copy_(mean)


def _bias_of(kernel: Kernel) -> Tensor:
    return kernel.weight.new_zeros(kernel.out_channels) if kernel.bias is None else kernel.bias


def _along(channels: Tensor, weight: Tensor) -> Tensor:
    """Return one number per output channel in the dtype of a weight, shaped to multiply it."""
    return channels.to(weight).reshape(-1, *(1,) * (weight.ndim - 1))

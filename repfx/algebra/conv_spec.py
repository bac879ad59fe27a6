"""`ConvSpec`: the sizes of one conv or linear layer, without its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from repfx.algebra.kernel import Ints, Kernel, Padding
from repfx.algebra.layers import Layer
from repfx.algebra.meaning import padding_of
from repfx.errors import InvalidInput


@dataclass(frozen=True)
class ConvSpec:
    """One conv's sizes, without its weights. Padding is (before, after) per axis; negative crops. `Kernel` has the meaning of each.

    A linear layer is a conv without axes: its window, stride, padding and dilation are empty.

    >>> site = ConvSpec.of(nn.Conv2d(8, 16, (3, 5), padding=(1, 2)))
    >>> str(site), site.inner((1, 1)).padding
    ('3×5 8→16', ((0, 0), (0, 0)))
    >>> linear = ConvSpec.of(nn.Linear(8, 16))
    >>> str(linear), linear.kernel_size, linear.is_linear
    ('linear 8→16', (), True)
    """

    in_channels: int
    out_channels: int
    kernel_size: Ints
    stride: Ints
    padding: Padding
    dilation: Ints
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: Ints = ()

    @classmethod
    def of(cls, conv: Layer) -> ConvSpec:
        """Return the sizes of a conv or linear layer."""
        if isinstance(conv, nn.Linear):
            return cls(conv.in_features, conv.out_features, (), (), (), ())
        window, stride, dilation = tuple(conv.kernel_size), tuple(conv.stride), tuple(conv.dilation)
        sizes = (window, stride, padding_of(conv), dilation, conv.groups, conv.padding_mode)
        output_padding = tuple(conv.output_padding) if conv.transposed else ()
        return cls(conv.in_channels, conv.out_channels, *sizes, conv.transposed, output_padding)

    @classmethod
    def of_kernel(cls, kernel: Kernel) -> ConvSpec:
        """Return the sizes of a kernel."""
        return cls(
            kernel.in_channels,
            kernel.out_channels,
            kernel.kernel_size,
            kernel.stride,
            kernel.padding,
            kernel.dilation,
            kernel.groups,
            kernel.padding_mode,
            kernel.transposed,
            kernel.output_padding,
        )

    @property
    def dimensions(self) -> int:
        return len(self.kernel_size)

    @property
    def is_linear(self) -> bool:
        """Whether this is a linear layer, which acts on the last axis of its input."""
        return not self.kernel_size

    @property
    def is_pointwise(self) -> bool:
        """Whether the window is a single tap. A linear layer has no window."""
        return not self.is_linear and all(k == 1 for k in self.kernel_size)

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.in_channels and self.groups > 1

    def inner(self, kernel_size: Ints, dilation: Ints | None = None) -> ConvSpec:
        """Return a smaller window in the middle of this one, whose outputs line up with this one's, position by position.

        `dilation` counts in taps of this window. The padding of the result may be negative, which crops the input.

        Raises:
            InvalidInput: the window doesn't fit, or the conv is transposed.
        """
        if self.transposed:
            raise InvalidInput(f"no smaller window lies in a transposed conv, such as {self}.")
        dilation = tuple(d * own for d, own in zip(dilation or (1,) * self.dimensions, self.dilation))
        padding = []
        for k, d, inner_k, inner_d, (before, after) in zip(
            self.kernel_size, self.dilation, kernel_size, dilation, self.padding
        ):
            spare = d * (k - 1) - inner_d * (inner_k - 1)
            if spare < 0:
                raise InvalidInput(f"a window of {inner_k} taps with dilation {inner_d} doesn't fit into {self}.")
            left = spare // (2 * d) * d
            padding.append((before - left, after - (spare - left)))
        return replace(self, kernel_size=kernel_size, dilation=dilation, padding=tuple(padding))

    def __str__(self) -> str:
        parts = ["×".join(map(str, self.kernel_size)) or "linear", f"{self.in_channels}→{self.out_channels}"]
        if any(s != 1 for s in self.stride):
            parts.append("stride " + "×".join(map(str, self.stride)))
        if any(d != 1 for d in self.dilation):
            parts.append("dilation " + "×".join(map(str, self.dilation)))
        if self.groups > 1:
            parts.append("depthwise" if self.is_depthwise else f"groups {self.groups}")
        if self.transposed:
            parts.append("transposed")
        if self.padding_mode != "zeros" and any(side for pair in self.padding for side in pair):
            parts.append(self.padding_mode)
        return " ".join(parts)

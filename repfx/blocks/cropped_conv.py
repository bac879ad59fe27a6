"""`CroppedConv`: a conv without weights of its own. It takes the middle of another conv's weights (RepNAS, eq. 5)."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor, nn

from repfx.algebra.baking import conv_module
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer
from repfx.algebra.meaning import Meaning, reads
from repfx.blocks.branch import Branch
from repfx.errors import InvalidInput


class CroppedConv(nn.Module):
    """A conv whose weight is the centre crop of the weight of `source`. That weight stays registered in `source` alone.

    Args:
        source: conv that has the weights, with the same channels and groups.
        site: sizes of this conv, whose window fits into the window of `source`.

    >>> source = nn.Conv2d(4, 4, 3)
    >>> small = CroppedConv(source, ConvSpec.of(nn.Conv2d(4, 4, (1, 3))))
    >>> bool((small.weight == source.weight[:, :, 1:2]).all()), len(list(small.parameters()))
    (True, 0)
    """

    def __init__(self, source: Layer, site: ConvSpec) -> None:
        super().__init__()
        self.site = site
        self._source = (source,)  # in a tuple, so that the source isn't registered here as well

    @staticmethod
    def fits(source: Layer, conv: Layer) -> bool:
        """Whether the weights of `conv` could be cropped from those of `source`."""
        inner, outer = ConvSpec.of(conv), ConvSpec.of(source)
        alike = conv.weight.shape[:2] == source.weight.shape[:2] and inner.groups == outer.groups
        alike = alike and not outer.transposed
        steps = zip(inner.kernel_size, outer.kernel_size, inner.dilation, outer.dilation)
        return alike and all(small <= large and (small == 1 or step == own) for small, large, step, own in steps)

    @property
    def weight(self) -> Tensor:
        """The weight ``(out, in / groups, *window)``, a view of the source's weight."""
        crop: Tensor = self._source[0].weight
        for axis, size in enumerate(self.site.kernel_size, start=2):
            crop = crop.narrow(axis, (crop.shape[axis] - size) // 2, size)
        return crop

    def kernel(self, like: Tensor) -> Kernel:
        """Return the conv as a kernel; differentiable."""
        site = self.site
        return Kernel(
            self.weight.to(like), None, site.stride, site.padding, site.dilation, site.groups, site.padding_mode
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(self.weight)(x)

    def independent(self) -> nn.Module:
        """Make a plain conv with a copy of these weights."""
        weight = self.weight
        conv: Layer = conv_module(self.site, weight, bias=False)
        conv.weight.detach().copy_(weight.detach())
        conv.requires_grad_(weight.requires_grad)
        return conv.train(self.training)  # type: ignore[no-any-return]

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise InvalidInput(
            f"the conv {self.site} takes the centre of another conv's weights (weights='shared'), and its replica would read the "
            "weights of the original, which lie on another device; use DistributedDataParallel instead of DataParallel."
        )

    def extra_repr(self) -> str:
        return f"{self.site}, cropped from another conv"


@reads(CroppedConv)
def _read_cropped_conv(conv: Layer) -> Meaning:
    return Meaning(
        "conv", conv.site.dimensions, conv.site.in_channels, lambda like, channels, dimensions: conv.kernel(like)
    )


def share(branch: Branch, source: Layer) -> None:
    """Let each free conv of a branch take the centre of the weights of `source`, if channels and windows allow it."""
    free = branch.free_convs
    for name, conv in branch.named_children():
        if any(conv is each for each in free) and CroppedConv.fits(source, conv):
            cropped = CroppedConv(source, ConvSpec.of(conv))
            setattr(branch, name, cropped.train(conv.training))


def unshare(branch: nn.Module) -> None:
    """Give the convs of a branch weights of their own."""
    for name, conv in branch.named_children():
        if isinstance(conv, CroppedConv):
            setattr(branch, name, conv.independent())


def is_shared(branch: nn.Module) -> bool:
    """Whether a conv of a branch takes its weights from another conv."""
    return any(isinstance(conv, CroppedConv) for conv in branch.children())

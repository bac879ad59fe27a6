"""Small nets of many constructs, each with inputs, for programs of torch.export. No two axes have the same size."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.testing import randomize_batch_norm

Inputs: TypeAlias = tuple[Any, ...]
Made: TypeAlias = tuple[nn.Module, Inputs]

NETS: dict[
    str, tuple[Callable[[], nn.Module], tuple[int, ...], int]
] = {}  # the net, its input's shape, and how many convs are left


def net(name: str, shape: tuple[int, ...], convs: int) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a class of nets without arguments."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        NETS[name] = cls, shape, convs
        return cls

    return register


def made(name: str, dtype: torch.dtype = torch.float64) -> Made:
    """Return a net in eval mode with random weights and statistics, and its inputs."""
    cls, shape, _ = NETS[name]
    torch.manual_seed(0)
    model = randomize_batch_norm(cls()).to(dtype).eval()
    return model, (torch.randn(shape, dtype=dtype),)


class Layers(nn.Module):
    """A net with layers by name."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


def _conv(a: int = 3, b: int = 4, size: Any = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, size, **options)


@net("branches", (2, 3, 9, 7), 1)
class Branches(Layers):
    def __init__(self) -> None:
        super().__init__(
            a=_conv(padding=1, bias=False),
            n=nn.BatchNorm2d(4),
            b=_conv(size=1),
            m=nn.BatchNorm2d(4),
            p=nn.AvgPool2d(3, 1, 1),
        )
        self.q = _conv(size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.n(self.a(x)) + 0.5 * self.m(self.b(x)) - self.p(self.q(x)) / 3)


@net("residual", (2, 4, 9, 7), 1)
class Residual(Layers):
    def __init__(self) -> None:
        super().__init__(a=_conv(4, 4, (1, 3), padding=(0, 1), groups=2), n=nn.BatchNorm2d(4), i=nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.n(self.a(x)) + x + self.i(x))


@net("bottleneck", (2, 3, 9, 7), 1)
class Bottleneck(Layers):
    """A bias in front of zero padding, for which the merged conv reads a channel of ones."""

    def __init__(self) -> None:
        super().__init__(
            a=_conv(3, 24, 1), n=nn.BatchNorm2d(24), b=_conv(24, 24, padding=1, groups=24), c=_conv(24, 3, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.c(self.b(self.n(self.a(x)))))


@net("one_dimension", (2, 3, 17), 2)
class OneDimension(Layers):
    def __init__(self) -> None:
        super().__init__(
            a=nn.Conv1d(3, 4, 5, stride=2, padding=2),
            n=nn.BatchNorm1d(4),
            b=nn.Conv1d(4, 4, 3, padding=1),
            c=nn.Conv1d(4, 4, 1, bias=False),
            m=nn.BatchNorm1d(4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n(self.a(x)))
        return torch.relu(self.m(self.b(x) + self.c(x) + x))


@net("three_dimensions", (2, 3, 9, 7, 5), 2)
class ThreeDimensions(Layers):
    def __init__(self) -> None:
        super().__init__(
            a=nn.Conv3d(3, 4, (3, 1, 3), stride=2, padding=(1, 0, 1)),
            n=nn.BatchNorm3d(4),
            b=nn.Conv3d(4, 4, 3, padding=1),
            c=nn.Conv3d(4, 4, 1, bias=False),
            m=nn.BatchNorm3d(4),
            p=nn.AvgPool3d(3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n(self.a(x)))
        return torch.relu(self.m(self.b(x) + self.c(x)) + self.p(x))


@net("transposed", (2, 4, 5, 7), 2)
class Transposed(Layers):
    def __init__(self) -> None:
        super().__init__(
            a=nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            n=nn.BatchNorm2d(6),
            b=nn.ConvTranspose2d(6, 5, (2, 3), dilation=(1, 2)),
            m=nn.BatchNorm2d(5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.m(self.b(torch.relu(self.n(self.a(x)))))


@net("linear", (2, 3, 9, 7), 1)
class Linear(Layers):
    def __init__(self) -> None:
        super().__init__(
            a=_conv(), l=nn.Linear(4, 5, bias=False), n=nn.BatchNorm1d(5), k=nn.Linear(5, 6), m=nn.BatchNorm1d(6)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.a(x)).mean((2, 3)).flatten(1)
        return self.m(self.k(torch.relu(self.n(self.l(x))))), x


@net("sequence_norm", (2, 6, 5), 0)
class SequenceNorm(Layers):
    """BatchNorm1d behind a linear layer on sequences, seen through transpositions and through a flat view."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(5, 4), n=nn.BatchNorm1d(4), b=nn.Linear(4, 3), m=nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n(self.a(x).transpose(1, 2)).transpose(1, 2))
        y = self.b(x)
        return self.m(y.flatten(0, 1)).reshape_as(y)


@net("pads", (2, 3, 9, 7), 3)
class Pads(Layers):
    def __init__(self) -> None:
        super().__init__(
            a=_conv(padding=1, padding_mode="reflect"),
            n=nn.BatchNorm2d(4),
            b=_conv(4, 4),
            m=nn.BatchNorm2d(4),
            c=_conv(4, 5, (2, 4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n(self.a(x)))
        x = torch.relu(self.m(self.b(F.pad(x, (1, 1, 1, 1)))))
        return self.c(F.pad(x, (1, 2, 0, 1)))


@net("same", (2, 3, 9, 7), 2)
class Same(Layers):
    def __init__(self) -> None:
        super().__init__(
            a=_conv(size=(2, 3), padding="same"),
            n=nn.BatchNorm2d(4),
            b=_conv(4, 5, padding=1, padding_mode="circular"),
            m=nn.BatchNorm2d(5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.m(self.b(torch.relu(self.n(self.a(x)))))


@net("standardized", (2, 3, 9, 7), 1)
class Standardized(Layers):
    """A conv whose weight is computed in forward."""

    def __init__(self) -> None:
        super().__init__(a=_conv(), n=nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.a.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.flatten(1).std(1).view(-1, 1, 1, 1)
        return self.n(F.conv2d(x, weight, self.a.bias, padding=1))


@net("written_weight", (2, 3, 9, 7), 1)
class WrittenWeight(Layers):
    """A conv whose computed weight is changed in place. Its BatchNorm stays in the graph that writes in place."""

    def __init__(self) -> None:
        super().__init__(a=_conv(), n=nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.a.weight.detach() * 2
        weight.add_(1)
        return self.n(F.conv2d(x, weight))


@net("dropout", (2, 3, 9, 7), 1)
class Dropout(Layers):
    def __init__(self) -> None:
        super().__init__(a=_conv(), d=nn.Dropout(0.3), n=nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.n(self.d(self.a(x)).clone()))


@net("in_place", (2, 4, 9, 7), 2)
class InPlace(Layers):
    """Tensors that are changed between, behind and beside convs and BatchNorms."""

    def __init__(self) -> None:
        super().__init__(a=_conv(4, 4, padding=1), n=nn.BatchNorm2d(4), b=_conv(4, 4, padding=1), m=nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.n(y)
        y.mul_(2)
        z += y
        z = torch.relu_(z)
        w = self.m(self.b(z))
        z.add_(1)
        return w + z


@net("called_twice", (2, 4, 9, 7), 3)
class CalledTwice(Layers):
    def __init__(self) -> None:
        super().__init__(a=_conv(4, 4, padding=1), n=nn.BatchNorm2d(4), b=_conv(4, 4), m=nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.m(self.b(self.n(self.a(torch.relu(self.a(x))))))


@net("tied", (2, 4, 9, 7), 2)
class Tied(Layers):
    def __init__(self) -> None:
        super().__init__(a=_conv(4, 4, padding=1), n=nn.BatchNorm2d(4), b=_conv(4, 4, padding=1), m=nn.BatchNorm2d(4))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.m(self.b(torch.relu(self.n(self.a(x)))))


@net("weight_read", (2, 3, 9, 7), 1)
class WeightRead(Layers):
    def __init__(self) -> None:
        super().__init__(a=_conv(), n=nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.n(self.a(x)), self.a.weight.square().sum() + x.sum()


@net("own_parameters", (2, 3, 9, 7), 1)
class OwnParameters(nn.Module):
    """Parameters of the root, and a scale that is a buffer which no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.bias = nn.Parameter(torch.randn(4))
        self.register_buffer("scale", torch.randn(4, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias) * self.scale + torch.tensor(  # type: ignore[operator]
            [[[0.5]], [[1.0]], [[2.0]], [[3.0]]], dtype=x.dtype
        )


@net("counts", (2, 3, 9, 7), 1)
class Counts(Layers):
    """A buffer that the program changes, and by which it scales."""

    def __init__(self) -> None:
        super().__init__(a=_conv(), n=nn.BatchNorm2d(4))
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.n(self.a(x)) * self.count


@net("changed_weight", (2, 3, 9, 7), 2)
class ChangedWeight(Layers):
    """A conv whose weight is a buffer that the program changes."""

    def __init__(self) -> None:
        super().__init__(a=_conv(4, 4), n=nn.BatchNorm2d(4))
        self.register_buffer("w", torch.randn(4, 3, 1, 1))
        self.m = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.a(torch.relu(self.m(F.conv2d(x, self.w)))))
        self.w.mul_(2)
        return y


@net("instance_norm", (2, 3, 9, 7), 1)
class InstanceNorm(Layers):
    def __init__(self) -> None:
        super().__init__(a=_conv(), n=nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
        self.n.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.a(x))


@net("concatenated", (2, 3, 9, 7), 1)
class Concatenated(Layers):
    def __init__(self) -> None:
        super().__init__(a=_conv(), b=_conv(3, 2, (3, 3)), c=_conv(6, 4, 1), n=nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.c(torch.cat([self.a(x), self.b(x)], 1)))


@net("cropped", (2, 3, 9, 7), 1)
class Cropped(Layers):
    def __init__(self) -> None:
        super().__init__(a=_conv(), b=_conv(size=1), n=nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.a(x) + self.b(x)[:, :, 1:-1, 1:-1])


@net("split", (2, 4, 9, 7), 2)
class Split(Layers):
    def __init__(self) -> None:
        super().__init__(a=_conv(2, 2, padding=1), n=nn.BatchNorm2d(2), b=_conv(4, 4), m=nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, 1)
        return self.m(self.b(torch.relu(torch.cat([self.n(self.a(one)), other], 1))))


@net("shuffled", (2, 3, 5, 7), 1)
class Shuffled(Layers):
    """A BatchNorm behind a conv with shuffled channels and upsampling between them."""

    def __init__(self) -> None:
        super().__init__(a=_conv(3, 8, padding=1), n=nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.n(F.interpolate(F.pixel_shuffle(self.a(x), 2), scale_factor=2.0))


@net("stacked", (2, 3, 9, 7), 1)
class Stacked(Layers):
    def __init__(self) -> None:
        super().__init__(a=_conv(padding=1), b=_conv(size=1), n=nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.n(torch.stack([self.a(x), self.b(x)]).sum(0))


@net("activated", (2, 3, 9, 7), 2)
class Activated(Layers):
    def __init__(self) -> None:
        super().__init__(a=_conv(), n=nn.BatchNorm2d(4), b=_conv(4, 5), m=nn.BatchNorm2d(5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(F.leaky_relu(self.n(self.a(x)), 1.0))
        return torch.neg(self.m(self.b(x)))


@net("bordered", (2, 3, 9, 7), 1)
class Bordered(Layers):
    """A 1×1 conv whose output is padded with its bias, in front of a conv."""

    def __init__(self) -> None:
        super().__init__(a=_conv(3, 4, 1), b=_conv(4, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        border = self.a.bias.view(1, -1, 1, 1)
        y = self.a(x)
        side = border.expand(y.shape[0], -1, y.shape[2], 1)
        y = torch.cat([side, y, side], 3)
        side = border.expand(y.shape[0], -1, 1, y.shape[3])
        return self.b(torch.cat([side, y, side], 2))


@net("written", (2, 3, 9, 7), 1)
class Written(Layers):
    """A 1×1 conv whose output is padded with zeros, over which its bias is written, strip by strip, in front of a conv."""

    def __init__(self) -> None:
        super().__init__(a=_conv(3, 4, 1), b=_conv(4, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.a(x), (1, 2, 2, 1))
        border = self.a.bias.view(1, -1, 1, 1)
        y[:, :, :2] = border
        y[:, :, -1:, :] = border
        y[..., 0:1] = border
        y[:, :, :, -2:] = border
        return self.b(y)


@net("half_written", (2, 3, 9, 7), 2)
class HalfWritten(Layers):
    """A padding that isn't all written over, or written over with another number, so that nothing can be merged."""

    def __init__(self) -> None:
        super().__init__(a=_conv(3, 4, 1), b=_conv(4, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.a(x), (1, 1, 1, 1))
        border = self.a.bias.view(1, -1, 1, 1)
        y[:, :, :1] = border
        y[:, :, -1:] = border
        y[..., :1] = border
        y[..., -1:] = border * 2
        return self.b(y)


@net("unbatched", (3, 9, 7), 2)
class Unbatched(Layers):
    """Convs without a batch axis."""

    def __init__(self) -> None:
        super().__init__(a=_conv(), b=_conv(4, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * torch.arange(1, 5, dtype=x.dtype).view(-1, 1, 1)) * 2


@net("batch_statistics", (4, 3, 9, 7), 2)
class BatchStatistics(Layers):
    def __init__(self) -> None:
        super().__init__(a=_conv(), n=nn.BatchNorm2d(4, track_running_stats=False), b=_conv(4, 4), m=nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.m(self.b(self.n(self.a(x))))


@net("outputs", (2, 3, 9, 7), 2)
class Outputs(Layers):
    """Outputs of several kinds: what is merged, what isn't, the input itself, twice the same, a number, nothing."""

    def __init__(self) -> None:
        super().__init__(a=_conv(), n=nn.BatchNorm2d(4), b=_conv(4, 4), m=nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.n(self.a(x))
        z = self.m(self.b(y))
        return {"y": y, "again": [y, z], "x": x, "number": 3, "nothing": None, "bias": self.a.bias}

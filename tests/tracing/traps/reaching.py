"""Models whose code reaches into their children."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.inline_net import Net
from tests.tracing.traps.parts import Block, conv_norm_twice


def helper(block: Any, x: Tensor) -> Any:
    return block.conv(x) + block(x)


class WithHelper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = Block()

    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else helper(self.b, x)


class Slices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = conv_norm_twice()

    def forward(self, x: Tensor) -> Any:
        part = self.f[:4](x)
        return self.f[4:](part) + part


class Taps(Slices):
    def forward(self, x: Tensor) -> Any:
        if x.sum() > 1e9:
            return x
        taps = []
        for index, layer in enumerate(self.f):
            x = layer(x)
            if index == 0:
                taps.append(x)
        return x + taps[0]


class Indexes(Slices):
    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else self.f[0](x).sin() + self.f[1](x)


class ReachesFarther(nn.Module):
    """A model that calls a part of its child; the child is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.b: Any = Net(lambda m, x: m.part(x).sin(), part=Block())

    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else self.b(x) + self.b.part(x)


class Features(nn.ModuleDict):
    """A dict of layers with a forward of its own, like the backbone of a detector."""

    def __init__(self) -> None:
        super().__init__({"conv": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4), "act": nn.ReLU()})

    def forward(self, x: Tensor) -> Any:
        for layer in self.values():
            x = layer(x)
        return x


class CallsFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Features()

    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else self.f(x)


class IndexesFeatures(CallsFeatures):
    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else self.f["conv"](x) + self.f(x)


class GoesThroughFeatures(CallsFeatures):
    def forward(self, x: Tensor) -> Any:
        taps = [x] if x.sum() < 1e9 else []
        for name, layer in self.f.items():
            taps.append(layer(taps[-1]).sin() if name == "conv" else layer(taps[-1]))
        return self.f(x) + taps[-1]


class NormalisesWhatItGets(CallsFeatures):
    """A model that calls methods of its own results whose names, `norm` and `values`, a dict of layers has, too."""

    def forward(self, x: Tensor) -> Any:
        if x.sum() > 1e9:
            return x
        y = self.f(x)
        found = OrderedDict(whole=y, half=y / 2)
        return y / y.norm() + sum(found.values())


class GoesThroughThemByAName(nn.Module):
    """A model that loops over its children with a variable that held something else before."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Features(), Features()])

    def forward(self, x: Tensor) -> Any:
        if x.sum() > 1e9:
            return x
        part: Any
        part = OrderedDict(whole=x)
        x = sum(part.values())
        for part in self.stages:
            x = part(x) + next(iter(part.values()))(x)
        return x


class CountsFeatures(CallsFeatures):
    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else self.f(x) * len(self.f)


class Children(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = Net(lambda m, x: m.n(m.a(x)), a=nn.Conv2d(4, 4, 1), n=nn.BatchNorm2d(4), c=nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else self.b(x) + nn.Sequential(*list(self.b.children())[:2])(x)


class CallsItselfThis(Slices):
    def forward(this, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else this.f[0](x).sin() + this.f[1](x)


class ViewsAndZips(nn.Module):
    """A model that calls functions with several arguments, none of which is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.b = Decoder()

    def forward(self, x: Tensor) -> Any:
        for factor, _ in zip((1.0, 2.0), range(2)):
            x = F.pad(x, (0, 0)).view(*x.shape) * factor if x.sum() < 1e9 else x
        return self.b(x)


class AsksForBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), nn.ReLU(), Block()])

    def forward(self, x: Tensor) -> Any:
        if x.sum() > 1e9:
            return x
        for layer in self.layers:
            x = x + layer(x) if isinstance(layer, Block) else layer(x)
        return x


class AsksForConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                x = x.relu()
        return x


class AsksForNorms(Slices):
    def forward(self, x: Tensor) -> Any:
        for layer in self.f:
            x = layer(x)
            if isinstance(layer, nn.BatchNorm2d):
                x = x.sin()
        return x


class Alias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.convs = [self.conv]

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.convs[0](x))


class Encoder(Block):
    def encode(self, x: Tensor) -> Any:
        return self(x).relu()

    @property
    def dtype(self) -> torch.dtype:
        return self.conv.weight.dtype


class Reads(nn.Module):
    """A model that can't be traced and calls other methods of its child than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.b = Encoder()

    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else self.b.encode(x.to(self.b.dtype))


SIZES: dict[str, Callable[[Any], int]] = {
    "width": lambda block: block.conv.out_channels,
    "height": lambda block: len(block.encode(torch.ones(1, 4, 3, 3, dtype=torch.float64))),
}
height_of = SIZES["height"]


class AsksByALambdaOfADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = Encoder()

    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 * height_of(self.b) else self.b(x)


class Decoder(Block):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Any:
        return super().forward(x if skip is None else x + skip)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = Decoder()

    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else self.b(x, x)


TRAPS: dict[str, Callable[[], nn.Module]] = {
    "sliced": Slices,
    "tapped": Taps,
    "indexed": Indexes,
    "indexed, by another name": CallsItselfThis,
    "calls of other things": ViewsAndZips,
    "features": Features,
    "features, called": CallsFeatures,
    "features, indexed": IndexesFeatures,
    "features, gone through": GoesThroughFeatures,
    "features, counted": CountsFeatures,
    "features, and other values": NormalisesWhatItGets,
    "features, by another name": GoesThroughThemByAName,
    "a part of a part": ReachesFarther,
    "helper function": WithHelper,
    "children": Children,
    "asks for blocks": AsksForBlocks,
    "asks for convs": AsksForConvs,
    "asks for norms": AsksForNorms,
    "alias in a list": Alias,
    "other methods": Reads,
    "other methods, by a lambda of a dict": AsksByALambdaOfADict,
    "argument with a default": UNet,
}

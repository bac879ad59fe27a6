"""Models with odd names, numbers and annotations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.inline_net import Net
from tests.tracing.traps.parts import Block


class Named(Block):
    def __init__(self, name: str, value: Any) -> None:
        super().__init__()
        setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        for name in ("meta", "graph", "code"):
            if isinstance(vars(self)["_modules"].get(name), nn.Module):
                x = vars(self)["_modules"][name](x)
        return x


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.bn = nn.ModuleDict({"class": nn.Conv2d(4, 4, 1)}), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.heads["class"](x))


class Annotates(Block):
    def forward(self, x: Annotated[Tensor, "b c h w"]) -> Any:
        return super().forward(x)


class Cast(Block):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


class ReadsNorm(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * self.bn.eps * self.bn.num_features


class NoBias(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * (2 if self.conv.bias is None else 3)


class ByDtype(Block):
    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else super().forward(x.to(self.conv.weight.dtype))


class ByKeyword(Block):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(input=x))


class ReadsABuffer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(4))

    def forward(self, x: Tensor) -> Any:
        return super().forward(x).relu() - self.mean.view(1, -1, 1, 1)  # type: ignore[operator]


class KeepsAnAttribute(Block):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        self.mean = y.mean()
        return y


class CastsItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.bn = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.bn(F.conv2d(x.float(), self.w.float()).double())


class ComplexWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, 3, 2, dtype=torch.complex128))
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.bn(F.conv2d(x, torch.fft.irfft2(self.w, s=(3, 3))))


def graph_with_autocast() -> fx.GraphModule:
    """A graph with autocast in the form that `torch.export` writes."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    entered = graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None))
    output = graph.call_module("1", (graph.call_module("0", (x,)),))
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
    graph.output(output)
    return fx.GraphModule(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), graph)


TRAPS: dict[str, Callable[[], nn.Module]] = {
    "an attribute named graph": lambda: Named("graph", object()),
    "an attribute named code": lambda: Named("code", "abc"),
    "a layer named meta": lambda: Named("meta", nn.Conv2d(4, 4, 1)),
    "a layer named graph": lambda: Named("graph", nn.Conv2d(4, 4, 1)),
    "a layer named code": lambda: Named("code", nn.Conv2d(4, 4, 1)),
    "a layer named class": Keyword,
    "annotated": Annotates,
    "numpy's numbers": lambda: Net(lambda m, x: F.relu(m.a(x)) / np.sqrt(7), a=nn.Conv2d(4, 4, 1)),
    "autocast": Cast,
    "autocast in a graph": graph_with_autocast,
    "settings of the norm": ReadsNorm,
    "no bias": NoBias,
    "dtype of the weight": ByDtype,
    "input by keyword": ByKeyword,
    "a buffer": ReadsABuffer,
    "an attribute kept": KeepsAnAttribute,
    "a weight that is cast": CastsItsWeight,
    "a complex weight": ComplexWeight,
}

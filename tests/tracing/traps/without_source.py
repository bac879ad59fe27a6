"""Models whose source can't be read, as in a REPL or where Python has compiled files alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_CODE = """
import torch
from torch import nn

class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.name = "0"

class Plain(Parts):
    def forward(self, x):
        return self.body(x).relu() + x

class Decides(Parts):
    def forward(self, x):
        return self.body(-x if x.sum() > 1e9 else x)

class ReadsAWeight(Parts):
    def forward(self, x):
        return self.body(-x if x.sum() > 1e9 else x) * self.body[0].weight.norm()

class Indexes(Parts):
    def forward(self, x):
        return self.body[0](-x if x.sum() > 1e9 else x).sin() + self.body(x)

class AsksForClasses(Parts):
    def forward(self, x):
        for layer in self.body:
            x = layer(x) * (2 if type(layer) is nn.Conv2d else 1)
        return x

class AsksByName(Parts):
    def forward(self, x):
        for layer in self.body:
            x = layer(x) * (2 if layer.__class__.__name__ == "Conv2d" else 1)
        return x

class AsksForNorms(Parts):
    def forward(self, x):
        for layer in self.body:
            x = layer(x) * (2 if isinstance(layer, nn.BatchNorm2d) else 1)
        return x

class Helped(Parts):
    def forward(self, x):
        return self.body(x) * measure(self.body)

def measure(part):
    return len(list(part.modules()))

class ByText(Parts):
    def forward(self, x):
        return getattr(self.body, self.name)(-x if x.sum() > 1e9 else x) + self.body(x)

class Penalized(Parts):
    def forward(self, x):
        return self.body(x) + sum(weight.square().sum() for weight in self.parameters())

class AsksForATensor(Parts):
    def forward(self, x):
        return self.body(x) if type(x) is torch.Tensor else x * 0

class StopsItsNorm(Parts):
    def forward(self, x):
        self.body[1].eval()
        return self.body(x)

class HasALambda(Parts):
    def __init__(self):
        super().__init__()
        self.function = lambda m, x: m.body(x) * len(list(m.modules()))

    def forward(self, x):
        return self.function(self, x)
"""

_CLASSES: dict[str, Any] = {"__name__": "not_a_file"}
exec(_CODE, _CLASSES)

Plain, Decides = _CLASSES["Plain"], _CLASSES["Decides"]

TRAPS: dict[str, Callable[[], nn.Module]] = {
    f"without source: {name}": value
    for name, value in _CLASSES.items()
    if isinstance(value, type) and issubclass(value, _CLASSES["Parts"]) and name != "Parts"
}

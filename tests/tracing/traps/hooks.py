"""Models whose code returns what hooks have collected, and hooks that only watch."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.tracing.traps.parts import Block

OF_THIS_FILE: list[Tensor] = []


class Collects(nn.Module):
    """Two blocks; forward adds what a hook at the first one has seen. Subclasses say how the hook keeps it and how forward finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Block(), Block()
        self.found: list[Tensor] = []
        self.listen(self.first)

    def listen(self, layer: nn.Module) -> None:
        layer.register_forward_hook(lambda module, args, output: self.found.append(output))

    def forward(self, x: Tensor) -> Any:
        self.found.clear()
        y = self.last(self.first(x))
        return y + sum(each.sigmoid() for each in self.read())

    def read(self) -> list[Tensor]:
        return self.found


class ByAMethod(Collects):
    def listen(self, layer: nn.Module) -> None:
        layer.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.found.append(output)


class ByItsList(Collects):
    def listen(self, layer: nn.Module) -> None:
        found = self.found
        layer.register_forward_hook(lambda module, args, output: found.append(output))


class ByADefault(Collects):
    def listen(self, layer: nn.Module) -> None:
        def keep(module: nn.Module, args: Any, output: Tensor, self: Any = self) -> None:
            self.found.append(output)

        layer.register_forward_hook(keep)


class Store:
    """An object that collects by device, as timm's does."""

    def __init__(self) -> None:
        self.found: dict[Any, list[Tensor]] = defaultdict(list)

    def keep(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self.found[output.device].append(output)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.keep("", module, args, output)


class InAnObject(Collects):
    def listen(self, layer: nn.Module) -> None:
        self.store = Store()
        layer.register_forward_hook(functools.partial(self.store.keep, "first"))

    def forward(self, x: Tensor) -> Any:
        self.store.found.clear()
        y = self.last(self.first(x))
        return y + sum(each.sigmoid() for each in self.store.found[x.device])


class ByAnObject(InAnObject):
    def listen(self, layer: nn.Module) -> None:
        self.store = Store()
        layer.register_forward_hook(self.store)


class InAGlobal(Collects):
    def listen(self, layer: nn.Module) -> None:
        layer.register_forward_hook(lambda module, args, output: OF_THIS_FILE.append(output))

    def forward(self, x: Tensor) -> Any:
        OF_THIS_FILE.clear()
        y = self.last(self.first(x))
        return y + sum(each.sigmoid() for each in OF_THIS_FILE)


class OnTheLayer(Collects):
    def listen(self, layer: nn.Module) -> None:
        def keep(module: Any, args: Any, output: Tensor) -> None:
            module.seen = output.detach()

        layer.register_forward_hook(keep)
        layer.seen = torch.zeros(2, 4, 8, 8, dtype=torch.float64)

    def read(self) -> Any:
        return [self.first.seen]


class OnTheLayerByItsName(OnTheLayer):
    def listen(self, layer: nn.Module) -> None:
        super().listen(layer)
        layer._forward_hooks.clear()
        layer.register_forward_hook(lambda module, args, output: setattr(module, "seen", output.detach()))


class BeforeALayer(Collects):
    def listen(self, layer: nn.Module) -> None:
        self.last.conv.register_forward_pre_hook(lambda module, args: self.found.append(args[0]))


class InAPart(nn.Module):
    """A parent reads what a part has collected."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.after = Collects(), Block()

    def forward(self, x: Tensor) -> Any:
        y = self.after(self.part(x))
        return y * self.part.found[0].sigmoid()


class ForAWhile(nn.Module):
    """Hooks that are there only while forward runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Block(), Block()

    def forward(self, x: Tensor) -> Any:
        found: list[Tensor] = []
        handle = self.first.conv.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            y = self.last(self.first(x))
        finally:
            handle.remove()
        return y + sum(each.sigmoid() for each in found)


TRAPS: dict[str, Callable[[], nn.Module]] = {
    "a hook that closes over the model": Collects,
    "a hook that is a method": ByAMethod,
    "a hook that closes over the model's list": ByItsList,
    "a hook with the model as a default": ByADefault,
    "a hook of an object that the model holds": InAnObject,
    "a hook that is an object": ByAnObject,
    "a hook that writes into a global": InAGlobal,
    "a hook that writes into its layer": OnTheLayer,
    "a hook that writes into its layer by name": OnTheLayerByItsName,
    "a hook before a layer": BeforeALayer,
    "a hook of a part": InAPart,
    "a hook for a while": ForAWhile,
}


class Watcher:
    """An object outside the model that holds the model, as those do that draw maps of attention."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self.model = model
        self.seen: list[Any] = []
        layer.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output.shape)

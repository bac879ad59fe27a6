"""Models whose code asks what its layers are, reaches them by text, reads them as a whole, or changes them."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.tracing.traps.parts import Block, conv_norm_twice

Convolution = nn.Conv2d
is_a = isinstance


class Parts(nn.Module):
    """A model that asks in code that can be traced. What it asks is a subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.bare = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.block, self.stage = Block(), conv_norm_twice()
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)])
        self.name, self.path, self.kinds = "conv", "block.conv", (nn.Conv2d, nn.Linear)

    def ask(self, x: Any) -> Any:
        raise NotImplementedError

    def each(self) -> Iterator[nn.Module]:
        yield from self.stage

    def last(self) -> nn.Module:
        return self.layers[-1]

    @property
    def all_layers(self) -> list[nn.Module]:
        return [self.block, *self.stage]

    def forward(self, x: Tensor) -> Any:
        return self.ask(x)


class DecidesByData(Parts):
    """A model that asks in code that can't be traced."""

    def forward(self, x: Tensor) -> Any:
        return self.ask(-x if x.sum() > 1e9 else x)


# ---- what a layer is


def exact_class(self: Any, x: Any) -> Any:
    for layer in self.layers:
        x = layer(x).sin() if type(layer) is nn.Conv2d else layer(x)
    return x


def one_of_several(self: Any, x: Any) -> Any:
    for layer in self.stage:
        x = layer(x) * (2 if type(layer) in (nn.Conv2d, nn.BatchNorm2d) else 1)
    return x


def one_of_kinds(self: Any, x: Any) -> Any:
    for layer in self.layers:
        x = layer(x) * (2 if isinstance(layer, self.kinds) else 1)
    return x


def looked_up(self: Any, x: Any) -> Any:
    act = {nn.Conv2d: torch.sin}
    for layer in self.stage:
        x = act.get(type(layer), torch.cos)(layer(x))
    return x


def by_name(self: Any, x: Any) -> Any:
    for layer in self.stage:
        x = layer(x).sin() if layer.__class__.__name__.endswith("2d") else layer(x)
    return x


def matched(self: Any, x: Any) -> Any:
    for layer in self.layers:
        match layer:
            case nn.Conv2d():
                x = layer(x).sin()
            case _:
                x = layer(x)
    return x


def subclass(self: Any, x: Any) -> Any:
    return self.block(x) + self.conv(x) * (2 if issubclass(type(self.conv), nn.Conv2d) else 1)


def other_name_of_isinstance(self: Any, x: Any) -> Any:
    for layer in self.layers:
        x = layer(x).sin() if is_a(layer, nn.Conv2d) else layer(x)
    return x


def other_name_of_the_class(self: Any, x: Any) -> Any:
    for layer in self.layers:
        x = layer(x).sin() if isinstance(layer, Convolution) else layer(x)
    return x


def no_identity(self: Any, x: Any) -> Any:
    x = self.conv(x)
    return x if isinstance(self.norm, nn.Identity) else self.norm(x).sin()


def in_a_function(self: Any, x: Any) -> Any:
    def is_conv(layer: Any) -> bool:
        return type(layer) is nn.Conv2d

    for layer in self.layers:
        x = layer(x).sin() if is_conv(layer) else layer(x)
    return x


def filtered(self: Any, x: Any) -> Any:
    for layer in filter(lambda each: type(each) is nn.Conv2d, self.stage):
        x = layer(x)
    return x


def zipped(self: Any, x: Any) -> Any:
    for factor, layer in zip((1, 2, 3, 4, 5), self.stage):
        x = layer(x) * (factor if layer.__class__ is nn.BatchNorm2d else 1)
    return x


def by_a_generator(self: Any, x: Any) -> Any:
    for layer in self.each():
        x = layer(x) * (2 if type(layer) is nn.BatchNorm2d else 1)
    return x


def by_a_method(self: Any, x: Any) -> Any:
    return self.last()(self.layers[0](x)) * (2 if type(self.last()) is nn.Conv2d else 1)


def by_a_property(self: Any, x: Any) -> Any:
    for layer in self.all_layers:
        x = layer(x) * (2 if type(layer) is Block or type(layer) is nn.BatchNorm2d else 1)
    return x


def has_statistics(self: Any, x: Any) -> Any:
    for layer in self.stage:
        x = layer(x) * (2 if hasattr(layer, "running_mean") else 1)
    return x


def as_text(self: Any, x: Any) -> Any:
    return self.block(x) * (2 if "BatchNorm2d" in f"{self.block}" else 1)


def without_bias(self: Any, x: Any) -> Any:
    return self.block(x) * (3 if self.block.conv.bias is None else 2)


def without_bias_or_norm(self: Any, x: Any) -> Any:
    return self.bare(x).relu() * (3 if self.bare.bias is None else 2)


def without_bias_by_text(self: Any, x: Any) -> Any:
    return self.norm(self.bare(x)) * (2 if getattr(self.bare, "bias", None) is not None else 3)


# ---- how many there are


def counts_modules(self: Any, x: Any) -> Any:
    return self.block(x) * len(list(self.modules()))


def counts_children(self: Any, x: Any) -> Any:
    return self.block(x) * len(list(self.block.children()))


def counts_norms(self: Any, x: Any) -> Any:
    return self.stage(x) * sum(isinstance(module, nn.BatchNorm2d) for module in self.modules())


def counts_parameters(self: Any, x: Any) -> Any:
    return self.stage(x) * sum(1 for _ in self.stage.parameters())


def counts_weights(self: Any, x: Any) -> Any:
    return self.block(x) * sum(weight.numel() for weight in self.block.parameters())


# ---- what is in them


def penalty(self: Any, x: Any) -> Any:
    return self.block(x) + sum(weight.square().mean() for weight in self.parameters())


def penalty_of_a_part(self: Any, x: Any) -> Any:
    return self.block(x) + nn.utils.parameters_to_vector(self.block.parameters()).norm()


def one_parameter(self: Any, x: Any) -> Any:
    return self.block(x) * self.block.get_parameter("conv.weight").norm()


def one_of_the_state(self: Any, x: Any) -> Any:
    return self.stage(x) * self.stage.state_dict()["0.weight"].norm()


def named_on_the_way(self: Any, x: Any) -> Any:
    if (layer := self.stage[0]) is not None:
        x = self.stage(x) * layer.weight.norm()
    return x


def other_parameters(self: Any, x: Any) -> Any:
    doubled = {name: weight * 2 for name, weight in self.block.named_parameters()}
    return torch.func.functional_call(self.block, doubled, (x,))


# ---- reached by text


def submodule(self: Any, x: Any) -> Any:
    return self.get_submodule(self.path)(x) + self.block(x)


def submodule_of_a_part(self: Any, x: Any) -> Any:
    return self.stage.get_submodule("0")(x) + self.stage(x)


def among_all(self: Any, x: Any) -> Any:
    return dict(self.named_modules())["block.conv"](x) + self.block(x)


def attrgetter(self: Any, x: Any) -> Any:
    return operator.attrgetter(self.path)(self)(x) + self.block(x)


def itemgetter(self: Any, x: Any) -> Any:
    return operator.itemgetter(0)(self.stage)(x) + self.stage(x)


def in_vars(self: Any, x: Any) -> Any:
    return vars(self.block)["_modules"]["conv"](x) + self.block(x)


def in_own_dict(self: Any, x: Any) -> Any:
    return self.__dict__["_modules"]["stage"][0](x) + self.stage(x)


def by_a_variable(self: Any, x: Any) -> Any:
    return getattr(self.block, self.name)(x) + self.block(x)


def step_by_step(self: Any, x: Any) -> Any:
    return functools.reduce(getattr, self.path.split("."), self)(x) + self.block(x)


def first_child(self: Any, x: Any) -> Any:
    return next(self.block.children())(x) + self.block(x)


def another_sequence(self: Any, x: Any) -> Any:
    return nn.Sequential(*list(self.stage)[:1])(x) + self.stage(x)


def another_copy(self: Any, x: Any) -> Any:
    return copy.deepcopy(self.stage)[0](x) + self.stage(x)


def listening(self: Any, x: Any) -> Any:
    heard: list[Any] = []
    handle = self.block.conv.register_forward_hook(lambda _module, _inputs, output: heard.append(output))
    x = self.block(x)
    handle.remove()
    return x + heard[0]


def applied(self: Any, x: Any) -> Any:
    seen: list[Any] = []
    self.block.apply(seen.append)
    return seen[0](x) * len(seen)


# ---- changed


def stops_its_norm(self: Any, x: Any) -> Any:
    self.norm.eval()
    return self.norm(self.conv(x))


def batch_statistics(self: Any, x: Any) -> Any:
    self.block.bn.train()
    x = self.block(x)
    self.block.bn.eval()
    return x


def stops_a_part(self: Any, x: Any) -> Any:
    self.stage[1].train(False)
    return self.stage(x)


def other_eps(self: Any, x: Any) -> Any:
    self.norm.eps = 0.5
    return self.norm(self.conv(x))


def other_eps_of_a_part(self: Any, x: Any) -> Any:
    x = self.block(x)
    self.block.bn.eps = 0.25
    return self.block(x)


def other_padding(self: Any, x: Any) -> Any:
    self.conv.padding = (0, 0)
    return self.norm(self.conv(x))


def without_its_norm(self: Any, x: Any) -> Any:
    self.block.bn = nn.Identity()
    return self.block(x)


ASKING: dict[str, Callable[[Any, Any], Any]] = {
    name.replace("_", " "): value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__module__", "") == __name__ and not isinstance(value, type)
}


# ---- what a value is


def exactly_a_tensor(self: Any, x: Any) -> Any:
    return self.block(x) if type(x) is Tensor else x * 0


def tensor_or_not(self: Any, x: Any) -> Any:
    return self.block(x) * {Tensor: 2}.get(type(x), 3)


def named_tensor(self: Any, x: Any) -> Any:
    return self.block(x) * (2 if type(x).__name__ == "Tensor" else 3)


def class_of_a_tensor(self: Any, x: Any) -> Any:
    return self.block(x) * (2 if x.__class__ is Tensor else 3)


def subclass_of_tensor(self: Any, x: Any) -> Any:
    y = self.block(x)
    return y * (2 if issubclass(type(y), Tensor) else 3)


def tensor_by_a_helper(self: Any, x: Any) -> Any:
    return self.block(x) * (2 if is_exactly_a_tensor(x) else 3)


def is_exactly_a_tensor(value: Any) -> bool:
    return type(value) == Tensor  # noqa: E721


VALUES: dict[str, Callable[[Any, Any], Any]] = {
    function.__name__.replace("_", " "): function
    for function in (
        exactly_a_tensor,
        tensor_or_not,
        named_tensor,
        class_of_a_tensor,
        subclass_of_tensor,
        tensor_by_a_helper,
    )
}


def asking(base: type[Parts], ask: Callable[[Any, Any], Any]) -> Callable[[], nn.Module]:
    """Return a class of models that ask something."""
    return type(base.__name__, (base,), {"ask": ask, "__module__": __name__})


TRAPS: dict[str, Callable[[], nn.Module]] = {
    f"{name}, {how}": asking(base, ask)
    for name, ask in {**ASKING, **VALUES}.items()
    for how, base in {"traced": Parts, "untraced": DecidesByData}.items()
}

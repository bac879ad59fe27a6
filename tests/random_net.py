"""Random small nets: branching graphs in 1 to 3 dimensions, with layers shared, values read twice and written into."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from repfx.testing import randomize_batch_norm
from repfx.testing.strategies import PADDING_MODES, tensors
from tests.random_numbers import numbers_from

# ---- nets as values: a list of calls, each of a layer or a function on earlier values


@dataclass(frozen=True)
class Call:
    """One call of a net: a layer, by its name, or one of `FUNCTIONS`, on earlier values, by their numbers."""

    name: str
    sources: tuple[int, ...]
    options: tuple[Any, ...] = ()


class RandomNet(nn.Module):
    """A module that runs its `program`. Value 0 is the input, and every call adds one value."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.shape, self.seed = shape, seed
        self.program: list[Call] = []
        self.outputs: tuple[int, ...] = ()

    def input(self) -> Tensor:
        """An input with a batch of two, always the same."""
        generator = numbers_from(self.seed)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64)

    def run(self, call: Call, values: list[Any]) -> Any:
        inputs = [values[source] for source in call.sources]
        if call.name in FUNCTIONS:
            return FUNCTIONS[call.name](self, *inputs, *call.options)
        return getattr(self, call.name)(*inputs)

    def forward(self, x: Any) -> Any:
        values = [x]
        for call in self.program:
            values.append(self.run(call, values))
        outputs = tuple(values[index] for index in self.outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    def __repr__(self) -> str:
        return "\n".join([super().__repr__(), *map(str, self.program), f"outputs {self.outputs}, shape {self.shape}"])


def average_pool(net: RandomNet, x: Any, size: int, stride: int, padding: int, counted: bool) -> Any:
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(net.shape) - 3]
    return pool(x, size, stride, padding, count_include_pad=counted)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": lambda net, a, b: a + b,
    "sub": lambda net, a, b: a - b,
    "iadd": lambda net, *terms: operator.iadd(*terms),  # type: ignore[no-untyped-call]
    "isub": lambda net, *terms: operator.isub(*terms),  # type: ignore[no-untyped-call]
    "cat": lambda net, a, b: torch.cat([a, b], 1),
    "relu": lambda net, x: F.relu(x),
    "relu_": lambda net, x: x.relu_(),
    "neg": lambda net, x: -x,
    "times": lambda net, x, value: x * value,
    "over": lambda net, x, value: x / value,
    "plus": lambda net, x, value: value + x,
    "minus": lambda net, x, value: value - x,
    "times_parameter": lambda net, x, name: getattr(net, name) * x,
    "plus_parameter": lambda net, x, name: x + getattr(net, name),
    "pad": lambda net, x, sides, mode: F.pad(x, sides, mode),
    "average_pool": average_pool,
}

# ---- how they are drawn


class Builder:
    """A builder that adds drawn calls to a net. It runs each at once, so that the sizes of values are known to later calls."""

    def __init__(self, draw: st.DrawFn, net: RandomNet, *, biases: bool) -> None:
        self.draw, self.net, self.biases = draw, net, biases
        self.dimensions = len(net.shape) - 2
        self.values = [net.input()]

    def call(self, name: str, *sources: int, options: tuple[Any, ...] = ()) -> int:
        call = Call(name, sources, options)
        self.values.append(self.net.run(call, self.values))
        self.net.program.append(call)
        return len(self.values) - 1

    def layer(self, layer: nn.Module, source: int) -> int:
        name = f"{type(layer).__name__.lower()}{len(self.values)}"
        self.net.add_module(name, layer.double().eval())
        return self.call(name, source)

    def class_of(self, name: str) -> Any:
        """torch's layer of that name for the net's dimensions."""
        return getattr(nn, f"{name}{self.dimensions}d")

    def chance(self, *kinds: Any) -> Any:
        return self.draw(st.sampled_from(kinds))

    def source(self) -> int:
        """Draw a value: often the last one, so that nets get deep, otherwise any."""
        last = len(self.values) - 1
        return self.draw(st.one_of(st.just(last), st.integers(0, last)))

    def channels(self, index: int) -> int:
        return int(self.values[index].shape[1])

    def sizes(self, index: int) -> tuple[int, ...]:
        return tuple(self.values[index].shape[2:])

    # -- layers and functions one after another

    def conv_layer(self, source: int, out: int, stride: int, reach: tuple[int | None, ...]) -> Any:
        """A conv for which `source` is large enough; `reach`, 2 · padding - extent, fixes the size of its output."""
        axes = list(zip(self.sizes(source), reach))
        modes = [mode for mode in PADDING_MODES if all(windows(size, mode, fixed) for size, fixed in axes)]
        mode = self.chance(*modes)
        kernel_size, dilation, padding = zip(*(self.chance(*windows(size, mode, fixed)) for size, fixed in axes))
        channels = self.channels(source)
        groups = self.chance(*(g for g in (1, 2, 3, 4) if channels % g == out % g == 0))
        bias = self.biases or self.chance(True, False)
        sizes = (channels, out, kernel_size, stride, padding, dilation, groups, bias)
        return self.class_of("Conv")(*sizes, padding_mode=mode)

    def norm_layer(self, channels: int) -> nn.Module:
        tracked = self.draw(st.integers(0, 9)) > 0
        eps, affine = self.chance(1e-5, 0.1), self.chance(True, False)
        layer: nn.Module = self.class_of("BatchNorm")(channels, eps, affine=affine, track_running_stats=tracked)
        return layer

    def add_conv(self) -> None:
        source = self.source()
        layer = self.conv_layer(source, self.chance(4, 2, 6), self.chance(1, 2), (None,) * self.dimensions)
        follow = self.chance("norm", "nothing", "sequence")
        if follow == "sequence":
            layer = nn.Sequential(layer, self.norm_layer(layer.out_channels), nn.ReLU(self.chance(True, False)))
        index = self.layer(layer, source)
        if follow == "norm":
            self.layer(self.norm_layer(self.channels(index)), index)

    def add_norm(self) -> None:
        source = self.source()
        self.layer(self.norm_layer(self.channels(source)), source)

    def add_plain_layer(self) -> None:
        in_place = self.chance(True, False)
        self.layer(self.chance(nn.ReLU(in_place), nn.Dropout(0.4, in_place), nn.Identity()), self.source())

    def add_function(self) -> None:
        name = self.chance("relu", "relu_", "neg", "times", "over", "plus", "minus")
        value = (self.chance(0.5, -2.0, 3.0),) if name in ("times", "over", "plus", "minus") else ()
        self.call(name, self.source(), options=value)

    def add_parameter(self) -> None:
        """Add a scale or shift: per channel, a single number, or along the last axis, which is no map per channel."""
        source = self.source()
        per_channel = (self.channels(source), *(1,) * self.dimensions)
        shape = self.chance(per_channel, (1, *per_channel), (1,), self.sizes(source)[-1:])
        name = f"parameter{len(self.values)}"
        self.net.register_parameter(name, nn.Parameter(self.draw(tensors(shape))))
        self.call(self.chance("times_parameter", "plus_parameter"), source, options=(name,))

    def add_pool(self) -> None:
        source = self.source()
        size = self.draw(st.integers(1, min(3, *self.sizes(source))))
        sizes = (size, self.chance(1, 2), self.draw(st.integers(0, size // 2)))
        kind = self.chance("function", "average", "maximum")
        if kind == "function":
            self.call("average_pool", source, options=(*sizes, self.chance(True, False)))
        elif kind == "maximum":
            self.layer(self.class_of("MaxPool")(*sizes), source)
        else:
            ceil_mode, counted = self.chance(False, True), self.chance(True, False)
            self.layer(self.class_of("AvgPool")(*sizes, ceil_mode, counted), source)

    def add_pad(self) -> None:
        source = self.source()
        sides = tuple(self.draw(st.integers(-1, 2)) for _ in range(2 * self.dimensions))
        if min(self.sizes(source)) > 2:
            self.call("pad", source, options=(sides, self.chance("constant", "reflect", "replicate", "circular")))

    # -- where paths part and meet, and layers are used again

    def add_parallel(self) -> None:
        """Add two or three paths from one value, whose ends are added or subtracted."""
        source = self.source()
        stride, out = self.chance(1, 2), self.chance(self.channels(source), 4)
        first = self.conv_layer(source, out, stride, (None,) * self.dimensions)
        reach = tuple(2 * p - d * (k - 1) for k, d, p in zip(first.kernel_size, first.dilation, first.padding))
        total = self.layer(first, source)
        if self.chance(True, False):
            total = self.layer(self.norm_layer(out), total)
        like_input = stride == 1 and not any(reach) and out == self.channels(source)
        for _ in range(self.chance(1, 2)):
            kind = self.chance("conv", "itself", "norm") if like_input else "conv"
            term = source
            if kind == "conv":
                term = self.layer(self.conv_layer(source, out, stride, reach), source)
            elif kind == "norm":
                term = self.layer(self.norm_layer(out), source)
            total = self.call(self.chance("add", "sub", "iadd", "isub"), total, term)

    def add_meeting(self) -> None:
        source = self.source()
        alike = [index for index, value in enumerate(self.values) if value.shape == self.values[source].shape]
        self.call(self.chance("add", "sub", "iadd", "cat"), source, self.chance(*alike))

    def add_second_call(self) -> None:
        """Call a layer once more, on a value as large as the one of its first call."""
        name = self.chance(*(name for name, _ in self.net.named_children()))
        first = next(call.sources[0] for call in self.net.program if call.name == name)
        alike = [index for index, value in enumerate(self.values) if value.shape == self.values[first].shape]
        self.call(name, self.chance(*alike))


def windows(size: int, mode: str, reach: int | None) -> list[tuple[int, int, int]]:
    """Every kernel size, dilation and padding that a conv can have on an axis of `size`."""
    longest = {"zeros": 2, "replicate": 2, "circular": size, "reflect": size - 1}[mode]
    return [
        (k, d, p)
        for p, k, d in itertools.product(range(min(2, longest) + 1), (1, 2, 3), (1, 2))
        if size + 2 * p > d * (k - 1) and (k > 1 or d == 1) and reach in (None, 2 * p - d * (k - 1))
    ]


STEPS = (
    Builder.add_conv,
    Builder.add_parallel,
    Builder.add_norm,
    Builder.add_plain_layer,
    Builder.add_meeting,
    Builder.add_function,
    Builder.add_parameter,
    Builder.add_pool,
    Builder.add_pad,
    Builder.add_second_call,
)


@st.composite
@torch.no_grad()
def random_nets(draw: st.DrawFn, *, biases: bool = False, shared: bool = True) -> RandomNet:
    """A net of at least one conv, in float64 and eval mode, with random BatchNorms; no two axes of its input are equally long.

    Args:
        biases: give every conv a bias.
        shared: call some layers twice.
    """
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    shape = (2, draw(st.sampled_from((4, 2, 3))), *draw(st.sampled_from(((7, 6), (8,), (5, 9), (4, 3, 5)))))
    builder = Builder(draw, RandomNet(shape, seed), biases=biases)
    draw(st.sampled_from(STEPS[:2]))(builder)
    for _ in range(draw(st.integers(0, 6))):
        draw(st.sampled_from(STEPS if shared else STEPS[:-1]))(builder)
    last = len(builder.values) - 1
    builder.net.outputs = (last, *draw(st.lists(st.integers(0, last), max_size=2)))
    randomize_batch_norm(builder.net.eval(), seed)
    return builder.net


AFFINE = ("neg", "times", "over", "plus", "minus", "times_parameter", "plus_parameter")


def add_affine(builder: Builder, index: int, shifts: bool) -> int:
    """Add up to two scales or shifts behind a value. A shift in front of a conv that pads would keep both apart."""
    for _ in range(builder.chance(0, 0, 1, 2)):
        name = builder.chance(*(name for name in AFFINE if shifts or name in ("neg", "times", "over")))
        options: tuple[Any, ...] = (builder.chance(0.5, -2.0, 3.0),)
        if name.endswith("parameter"):
            options = (f"parameter{len(builder.values)}",)
            shape = (builder.channels(index), *(1,) * builder.dimensions)
            values = torch.rand(shape, generator=numbers_from(builder.net.seed + index), dtype=torch.float64) + 0.5
            builder.net.register_parameter(options[0], nn.Parameter(values))
        index = builder.call(name, index, options=() if name == "neg" else options)
    return index


def add_beside(builder: Builder, index: int, source: int) -> int:
    """Add what has no weights to a value: the site's input, its average over a window, or the value itself."""
    kinds = ["nothing", "itself"] + ["input", "pool"] * (builder.values[index].shape == builder.values[source].shape)
    kind = builder.chance(*kinds)
    if kind == "nothing":
        return index
    if kind == "itself":
        return builder.call("add", index, index)
    beside = source if kind == "input" else builder.call("average_pool", source, options=(3, 1, 1, True))
    return builder.call(builder.chance("add", "sub", "add"), *builder.chance((index, beside), (beside, index)))


@st.composite
@torch.no_grad()
def nets_of_sites(draw: st.DrawFn) -> RandomNet:
    """A net of one to three sites, a conv and mostly a BatchNorm each, with maps around them that have no weights or one per channel."""
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    shape = (2, draw(st.sampled_from((4, 6))), *draw(st.sampled_from(((7, 6), (8,), (5, 4, 6)))))
    builder = Builder(draw, RandomNet(shape, seed), biases=False)
    index = 0
    for _ in range(draw(st.integers(1, 3))):
        source = builder.call("relu", index)
        channels = builder.channels(source)
        in_front = builder.chance(True, False, False)
        index = builder.layer(builder.class_of("BatchNorm")(channels), source) if in_front else source
        index = add_affine(builder, index, shifts=False)
        padding, groups = 0 if in_front else builder.chance(1, 1, 1, 0), builder.chance(1, 2, channels)
        sizes = (channels, channels, 3, 1, padding, 1, groups, builder.chance(True, False))
        index = builder.layer(builder.class_of("Conv")(*sizes), index)
        index = add_beside(builder, add_affine(builder, index, shifts=True), source)
        if builder.chance(True, True, False):
            index = builder.layer(builder.class_of("BatchNorm")(channels), index)
        index = add_affine(builder, add_beside(builder, add_affine(builder, index, shifts=True), source), shifts=True)
        if min(builder.sizes(index)) < 4:
            break
    builder.net.outputs = (builder.call("relu", index),)
    randomize_batch_norm(builder.net.eval(), seed)
    return builder.net

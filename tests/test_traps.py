"""Models that a tracer is easily wrong about: what is fused or expanded computes the same, or is left alone."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import repfx
from repfx.errors import InvalidInput, RepfxError
from repfx.testing import randomize_batch_norm
from tests.inline_net import Net, convs, error_of, image, norms, ready, reasons
from tests.random_numbers import numbers_from


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x))


class Untraceable(nn.Module):
    """Code around a block that depends on the input."""

    def __init__(self, function: Callable[..., Any], b: nn.Module) -> None:
        super().__init__()
        self.function, self.b = function, b

    def forward(self, x: Tensor) -> Any:
        return self.function(self, -x if x.sum() > 1e9 else x)


def conv_norm_twice() -> nn.Sequential:
    convs, norms = (
        [make() for _ in range(2)] for make in (lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: nn.BatchNorm2d(4))
    )
    return nn.Sequential(convs[0], norms[0], nn.ReLU(), convs[1], norms[1])


# ---- code that isn't the class's


def patched() -> nn.Module:
    block = Block()
    block.forward = types.MethodType(lambda self, x: Block.forward(self, x).relu() * 3, block)  # type: ignore[method-assign]
    return block


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


class OwnCall(Block):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x * 2 + 1)


# ---- code that asks what it was given


class Unpacks(Block):
    def forward(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            x = x[0]
        return super().forward(x)


class Lists(Block):
    def forward(self, x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            x = x[0]
        return super().forward(x)


class IsTensor(Block):
    def forward(self, x: Any) -> Any:
        return super().forward(x if torch.is_tensor(x) else x[0])


class WritesText(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x * 2 if str(x.dtype) == "torch.float64" else x)


class FormatsText(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x * 2 if f"{x.device}" == "cpu" else x)


class Catches(Block):
    def forward(self, x: Tensor) -> Any:
        try:
            if x.shape[0] > 1:
                x = x * 2
        except Exception:
            pass
        return super().forward(x)


class Sizes(Block):
    """Asks for the type of sizes, which are no tensors."""

    def forward(self, x: Tensor) -> Any:
        height = x.shape[2]
        return super().forward(x * (2 if isinstance(height, int) and isinstance(x.shape, tuple) else 3))


# ---- code that writes


class Constrained(nn.Conv2d):
    """Its weights have a largest norm (EEGNet's Conv2dWithConstraint)."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
        return super().forward(x)


class ClampsItsNorm(Block):
    def forward(self, x: Tensor) -> Any:
        self.bn.weight.data.clamp_(0)
        return super().forward(x)


class ClampsAParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.w = nn.Conv2d(4, 4, 1), nn.Parameter(torch.rand(4, 1, 1) + 1)

    def forward(self, x: Tensor) -> Any:
        self.w.data.clamp_(0, 0.5)
        return self.c(x) * self.w


class Observer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.copy_(x.abs().max())  # type: ignore[operator]
        return x


class Observed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o, self.c = Observer(), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.o(x)
        return self.c(x) / self.o.seen


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(x.sigmoid())


def swished(m: Any, x: Tensor) -> Any:
    x = x.sin()
    y = m.a(x)
    gate = m.act(x)
    return (y + x) * gate


def powered(m: Any, x: Tensor) -> Any:
    x = x.sin()
    y = x
    y **= 2
    return m.a(x).relu() + y


def buffered_conv() -> nn.Module:
    """A conv whose weight is a buffer."""
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    weight = conv.weight.data
    del conv.weight
    conv.register_buffer("weight", weight)
    return conv


# ---- code that reaches into what is in it


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
    """For a part of a part, which is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.b: Any = Net(lambda m, x: m.part(x).sin(), part=Block())

    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else self.b(x) + self.b.part(x)


class Features(nn.ModuleDict):
    """Runs its layers by itself, as the backbone of a detector does."""

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
    """Reads, by the names that a dict of layers and one of these have, something of what it has computed."""

    def forward(self, x: Tensor) -> Any:
        if x.sum() > 1e9:
            return x
        y = self.f(x)
        found = OrderedDict(whole=y, half=y / 2)
        return y / y.norm() + sum(found.values())


class GoesThroughThemByAName(nn.Module):
    """A name that has stood for something else before."""

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
    """Calls with several arguments, none of them of a module."""

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
    """Code that can't be traced and goes by other names than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.b = Encoder()

    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else self.b.encode(x.to(self.b.dtype))


class Decoder(Block):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Any:
        return super().forward(x if skip is None else x + skip)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = Decoder()

    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 1e9 else self.b(x, x)


class LoRA(nn.Module):
    """Merges its weights when it is put into eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.delta = nn.Conv2d(4, 4, 3, padding=1), nn.Parameter(torch.randn(4, 4, 3, 3))
        self.merged = False

    def train(self, mode: bool = True) -> LoRA:
        super().train(mode)
        if mode == self.merged:
            self.conv.weight.data += (-1 if mode else 1) * self.delta.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Any:
        if self.merged:
            return self.conv(x)
        if x.sum() > 1e9:
            return x
        return F.conv2d(x, self.conv.weight + self.delta, self.conv.bias, padding=1)


class Forgetful(Block):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


# ---- names, numbers and annotations


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


class FreezesItsNorm(Block):
    def train(self, mode: bool = True) -> FreezesItsNorm:
        super().train(mode)
        self.bn.eval()
        return self


def graph_with_autocast() -> fx.GraphModule:
    """As `torch.export` writes it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    entered = graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None))
    output = graph.call_module("1", (graph.call_module("0", (x,)),))
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
    graph.output(output)
    return fx.GraphModule(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), graph)


TRAPS: dict[str, Callable[[], nn.Module]] = {
    "forward replaced on the instance": patched,
    "… of a part": lambda: nn.Sequential(patched(), nn.ReLU()),
    "… of a part of what can't be traced": lambda: Untraceable(lambda m, x: m.b(x), patched()),
    "a call of its own": OwnCall,
    "a call of its own, in a part": lambda: nn.Sequential(OwnCall(), nn.Conv2d(4, 4, 1)),
    "isinstance, tensor": Unpacks,
    "isinstance, list": Lists,
    "is_tensor": IsTensor,
    "dtype as text": WritesText,
    "device as text": FormatsText,
    "error caught": Catches,
    "types of sizes": Sizes,
    "weight.data assigned": lambda: nn.Sequential(Constrained(4, 4, 3), nn.BatchNorm2d(4)),
    "norm written to": ClampsItsNorm,
    "parameter written to": ClampsAParameter,
    "buffer of an observer": Observed,
    "in place without saying so": lambda: Net(swished, a=nn.Conv2d(4, 4, 3, padding=1), act=Swish()),
    "**=": lambda: Net(powered, a=nn.Conv2d(4, 4, 1)),
    "buffer for a weight, called twice": lambda: Net(
        lambda m, x: m.b(m.a(x)).relu() + m.a(x), a=buffered_conv(), b=nn.BatchNorm2d(4)
    ),
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
    "argument with a default": UNet,
    "merges in eval mode": lambda: nn.Sequential(LoRA(), nn.BatchNorm2d(4)),
    "train returns nothing": Forgetful,
    "compiled part": lambda: nn.Sequential(compiled(Block()), nn.ReLU()),
    "scripted part": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), torch.jit.script(nn.ReLU())),
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
    "a norm that stays frozen": FreezesItsNorm,
}


@pytest.mark.parametrize("name", TRAPS)
def test_it_is_fused_right_or_left_alone(name: str) -> None:
    model = in_eval_mode(TRAPS[name]())
    expected = copy.deepcopy(model)(image_of(0))
    fused = repfx.fuse(model)
    assert_same(fused, expected)
    assert_same(model, expected)


@pytest.mark.parametrize("spec", ["acb", "qarepvgg"])
@pytest.mark.parametrize("name", TRAPS)
def test_it_is_expanded_right_or_left_alone(name: str, spec: str) -> None:
    model = in_eval_mode(TRAPS[name]())
    expected = copy.deepcopy(model)(image_of(0))
    try:
        expanded = repfx.expand(model, spec)
    except RepfxError:
        return
    assert_same(expanded, expected)
    assert_same(repfx.fuse(expanded), expected)
    if not backward(copy.deepcopy(model)):
        return
    assert backward(expanded)
    for block in (module for module in expanded.modules() if isinstance(module, repfx.RepBlock)):
        called = {parameter.grad is not None for parameter in block.parameters()}
        assert len(called) == 1, "branches that nobody calls"


def backward(model: nn.Module) -> bool:
    """Train a model for a step; whether that can be done at all."""
    model.train()
    try:
        model(image_of(1)).double().sum().backward()
    except RuntimeError:
        return False
    return True


def in_eval_mode(model: nn.Module) -> nn.Module:
    """As `ready`, for one whose `eval` may return nothing."""
    randomize_batch_norm(model.double()).eval()
    return model


def image_of(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=numbers_from(seed))


def assert_same(model: nn.Module, expected: Tensor) -> None:
    found = copy.deepcopy(model)(image_of(0))
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= 1e-9 * float(expected.abs().max())


# ---- what isn't float, or has other channels than it seems


@pytest.mark.parametrize("function", [lambda m, x: m.a(x / 255.0), lambda m, x: m.a((x - m.mean) / m.std)])
def test_pixels_in_bytes_are_still_made_numbers_with_a_fraction(function: Any) -> None:
    model = Net(function, a=nn.Conv2d(4, 8, 3))
    model.register_buffer("mean", torch.rand(4, 1, 1))
    model.register_buffer("std", torch.rand(4, 1, 1) + 1)
    x = torch.randint(0, 255, (1, 4, 9, 10), dtype=torch.uint8)
    assert torch.allclose(repfx.fuse(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_grey_image_is_spread_over_the_channels_of_a_constant() -> None:
    model = Net(lambda m, x: m.a(x / m.std), a=nn.Conv2d(3, 4, 3)).double()
    model.register_buffer("std", torch.rand(1, 3, 1, 1, dtype=torch.float64) + 1)
    assert error_of(repfx.fuse(model), model, image(2, 1, 6, 7)) < 1e-12


def test_a_linear_layer_without_outputs() -> None:
    model = Net(lambda m, x: m.a(x) * 2 + 1, a=nn.Linear(8, 0)).double()
    assert repfx.fuse(model)(image(2, 8)).shape == (2, 0)


@pytest.mark.parametrize("nothing", [None, "resnet18", torch.ones(2)])
@pytest.mark.parametrize("verb", [repfx.fuse, repfx.restore, repfx.sites, lambda model: repfx.expand(model, "acb")])
def test_what_is_no_model_is_an_invalid_input(verb: Any, nothing: Any) -> None:
    with pytest.raises(InvalidInput, match=r"not a torch\.nn\.Module"):
        verb(nothing)


class CopiesItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = Block()

    def forward(self, x: Tensor) -> Any:
        return self.b(x)

    def __deepcopy__(self, memo: Any) -> CopiesItself:
        return self


def test_a_part_that_is_its_own_copy_is_no_part_to_change() -> None:
    model = ready(nn.Sequential(CopiesItself(), nn.Conv2d(4, 4, 1)))
    before = model(image_of(0))
    with pytest.raises(InvalidInput, match=r"'0'.*isn't copied"):
        repfx.fuse(model)
    assert torch.equal(model(image_of(0)), before)


def test_hooks_on_all_modules_are_seen() -> None:
    calls: list[str] = []
    model = ready(Block())
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    try:
        fused = repfx.fuse(model)
        fused(image_of(0))
    finally:
        handle.remove()
    assert "BatchNorm2d" in calls


# ---- restore where code around can't be traced


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: Untraceable(lambda m, x: m.b(x), model)])
def test_a_norm_comes_back_once(wrap: Any) -> None:
    model = ready(wrap(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))))
    fused = repfx.fuse(model)
    restored = repfx.restore(fused) if not norms(fused) else fused
    assert error_of(restored, model, image_of(0)) < 1e-12
    model.load_state_dict(restored.state_dict(), strict=True)


# ---- what is loaded, kept and set later


def test_what_is_computed_from_buffers_is_loaded_with_them() -> None:
    one, other = in_eval_mode(ReadsABuffer()), in_eval_mode(ReadsABuffer())
    fused = repfx.fuse(one)
    fused.load_state_dict(repfx.fuse(other).state_dict(), strict=True)
    assert error_of(fused, other, image_of(0)) < 1e-12


def test_attributes_are_still_kept() -> None:
    model = in_eval_mode(KeepsAnAttribute())
    fused = repfx.fuse(model)
    assert torch.allclose(fused(image_of(0)).mean(), fused.mean)
    assert "mean" not in vars(model)


@torch.no_grad()
def test_a_frozen_norm_stays_frozen_in_an_expanded_model() -> None:
    model = in_eval_mode(FreezesItsNorm())
    expanded = repfx.expand(model, "acb").train()
    assert error_of(expanded, model.train(), image_of(0)) < 1e-9


# ---- what is still done where it can be


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (Unpacks, 0),
        (Lists, 0),
        (IsTensor, 0),
        (Sizes, 0),
        (Forgetful, 0),
        (ByKeyword, 0),
        (Annotates, 0),
        (ViewsAndZips, 0),
        (Features, 0),
        (CallsFeatures, 0),
        (NormalisesWhatItGets, 0),
    ],
)
def test_what_only_asks_is_fused_all_the_same(make: Any, left: int) -> None:
    fused = repfx.fuse(in_eval_mode(make()))
    assert len(norms(fused)) == left, reasons(fused)
    assert len(convs(fused)) == 1


def test_a_graph_that_took_its_input_for_a_tensor_says_so() -> None:
    fused = repfx.fuse(ready(Unpacks()))
    with pytest.raises(InvalidInput, match="traced with a tensor where it is called with a list"):
        fused([image_of(0)])

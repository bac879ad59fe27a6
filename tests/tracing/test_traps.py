"""Models that a tracer easily gets wrong: repfx fuses or expands them without changing what they compute, or leaves them alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.errors import InvalidInput, RepfxError
from repfx.passes.fuse import Fuse
from repfx.records.journal import apply
from repfx.testing import randomize_batch_norm
from tests.inline_net import Net, convs, error_of, image, norms, ready, reasons
from tests.random_numbers import numbers_from
from tests.tracing.traps import TRAPS, chance, inputs, names, own_code, reaching, writing
from tests.tracing.traps.inputs import IsTensor, Lists, Sizes, Unpacks
from tests.tracing.traps.names import Annotates, ByKeyword, KeepsAnAttribute, ReadsABuffer
from tests.tracing.traps.own_code import (
    Forgetful,
    FreezesItsNorm,
    IsSimplerInATrace,
    StaysInFloat32,
    SwitchesAutocastOff,
)
from tests.tracing.traps.parts import Block, Untraceable
from tests.tracing.traps.reaching import CallsFeatures, Features, NormalisesWhatItGets, ViewsAndZips

# traps of which each way to expand is tested by default
FEW = own_code.TRAPS | inputs.TRAPS | writing.TRAPS | reaching.TRAPS | names.TRAPS


@pytest.mark.slow_one_in(8)
@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", TRAPS)
def test_it_is_fused_right_or_left_alone(name: str) -> None:
    model = in_eval_mode(TRAPS[name]())
    expected = copy.deepcopy(model)(image_of(0))
    fused = repfx.fuse(model)
    assert_same(fused, expected)
    assert_same(model, expected)


@pytest.mark.one_in(2)
@pytest.mark.slow_one_in(14)
@pytest.mark.parametrize("spec", ["acb", pytest.param("qarepvgg", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in TRAPS]
)
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


@pytest.mark.slow_one_in(14)
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAPS)
def test_it_is_restored_right_or_left_alone(name: str) -> None:
    model = in_eval_mode(TRAPS[name]())
    expected = copy.deepcopy(model)(image_of(0))
    try:
        restored = repfx.restore(repfx.fuse(model))
    except RepfxError:
        return
    assert_same(restored, expected)


@pytest.mark.slow_one_in(14)
@pytest.mark.slow
@pytest.mark.parametrize("statistics", [None, "frozen"])
@pytest.mark.parametrize("name", TRAPS)
def test_it_is_squeezed_right_or_left_alone(name: str, statistics: Any) -> None:
    model = in_eval_mode(TRAPS[name]())
    expected = copy.deepcopy(model)(image_of(0))
    with contextlib.suppress(RepfxError):
        repfx.squeeze(model, statistics=statistics)
    assert_same(model, expected)


@pytest.mark.slow_one_in(14)
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAPS)
def test_its_branches_are_dropped_right(name: str) -> None:
    """All branches leave, until each block is a conv again."""
    try:
        model = repfx.expand(in_eval_mode(TRAPS[name]()), "acb")
    except RepfxError:
        return
    randomize_batch_norm(model)
    expected = copy.deepcopy(model)(image_of(0))
    for path, branch in [(path, name) for path, block in blocks_of(model).items() for name in block.branches]:
        repfx.drop(model, path, branch)
    assert not blocks_of(model)
    assert_same(model, expected)


@pytest.mark.slow_one_in(14)
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAPS)
def test_its_convs_are_fused_in_place_right_or_left_alone(name: str) -> None:
    model = in_eval_mode(TRAPS[name]())
    expected = copy.deepcopy(model)(image_of(0))
    try:
        found = [site.path for site in repfx.sites(model) if site.refusal is None]
        apply(model, [Fuse(path) for path in found], None)
    except RepfxError:
        pass
    assert_same(model, expected)


def blocks_of(model: nn.Module) -> dict[str, repfx.RepBlock]:
    return {path: module for path, module in model.named_modules() if isinstance(module, repfx.RepBlock)}


def backward(model: nn.Module) -> bool:
    """Run a backward pass in training mode, and tell whether the model can do that with the numbers that it draws after this seed."""
    model.train()
    chance.seed(0)
    try:
        model(image_of(1)).double().sum().backward()
    except RuntimeError:
        return False
    return True


def in_eval_mode(model: nn.Module) -> nn.Module:
    """Like `ready`, but for models whose `eval` may return None."""
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


OF_ONE_CHANNEL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a sum that isn't linear": lambda a, b: a + b.relu(),
    "a sum": lambda a, b: a + b,
    "a product": lambda a, b: a * b,
    "a quotient of activations": lambda a, b: a.relu() / (b.sigmoid() + 1),
}


@pytest.mark.parametrize("way", OF_ONE_CHANNEL)
def test_a_constant_spreads_what_two_convs_of_one_channel_make(way: str) -> None:
    class Spreads(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(5, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.register_buffer("scale", torch.randn(5, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.last(OF_ONE_CHANNEL[way](self.a(x), self.b(x)) * self.scale))
            return y

    model = ready(Spreads())
    fused = repfx.fuse(model)
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    assert (fused(x) - model(x)).abs().max() < 1e-12
    assert any("makes 1 channels into 5" in skip.reason for skip in repfx.report(fused).skipped)


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


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_on_all_modules_are_seen(kind: str) -> None:
    calls: list[str] = []
    model = ready(Block())
    register = getattr(nn.modules.module, f"register_module_{kind}")
    handle = register(lambda module, *_: calls.append(type(module).__name__))
    try:
        fused = repfx.fuse(model)
        fused(image_of(0).requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert "BatchNorm2d" in calls


# ---- restore where code around can't be traced


@pytest.mark.parametrize(
    "wrap", [lambda model: nn.Sequential(nn.DataParallel(model)), lambda model: Untraceable(lambda m, x: m.b(x), model)]
)
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
        (IsSimplerInATrace, 0),
    ],
)
def test_what_only_asks_is_fused_all_the_same(make: Any, left: int) -> None:
    fused = repfx.fuse(in_eval_mode(make()))
    assert len(norms(fused)) == left, reasons(fused)
    assert len(convs(fused)) == 1


def test_a_graph_that_took_its_input_for_a_tensor_says_so() -> None:
    fused = repfx.fuse(ready(Unpacks()))
    with pytest.raises(InvalidInput, match="traced with a tensor and is called with a list instead: pass a tensor"):
        fused([image_of(0)])


@pytest.mark.parametrize("make", [StaysInFloat32, SwitchesAutocastOff])
def test_code_without_autocast_stays_so_under_autocast(make: Any) -> None:
    model = make().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert repfx.fuse(model)(image_of(0).float()).dtype == torch.float32

"""Code that returns what hooks collected finds it after every verb; hooks that only watch cost no fusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import prune

import repfx
from repfx.errors import InvalidInput
from tests.inline_net import error_of, image, norms, ready, reasons
from tests.tracing.traps.hooks import TRAPS, Watcher
from tests.tracing.traps.parts import Block


def squeezed_in_place(model: nn.Module) -> Any:
    try:
        return repfx.squeeze(model, statistics="frozen")
    except InvalidInput:  # forward reaches into both blocks, so nothing can be squeezed
        return model


def inplace(model: nn.Module) -> Any:
    return repfx.expand(model, "acb", inplace=True)


def dropped(model: nn.Module) -> Any:
    expanded = repfx.expand(model, "acb")
    for path in [path for path, module in expanded.named_modules() if isinstance(module, repfx.RepBlock)]:
        repfx.drop(expanded, path, "kx1")
    return expanded


VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "fuse": repfx.fuse,
    "expand": lambda model: repfx.expand(model, "dbb"),
    "expand in place": inplace,
    "drop": dropped,
    "squeeze in place": squeezed_in_place,
    "expand, squeeze": lambda model: repfx.squeeze(repfx.expand(model, "acb"), statistics="frozen"),
    "expand, fuse": lambda model: repfx.fuse(repfx.expand(model, "acb")),
    "fuse, fuse": lambda model: repfx.fuse(repfx.fuse(model)),
}


@pytest.mark.slow_one_in(5)
@pytest.mark.one_in(3)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", TRAPS)
def test_what_hooks_collect_is_found(name: str, verb: str) -> None:
    model = ready(TRAPS[name]())
    x = image(2, 4, 8, 8)
    with torch.no_grad():
        expected = model(x)
    after = VERBS[verb](model)
    for each in (after, model):  # in this order: the hooks of a copy must not write into the original
        with torch.no_grad():
            assert float((each(x) - expected).abs().max()) < 1e-9 * float(expected.abs().max())


@pytest.mark.parametrize("name", TRAPS)
def test_the_reason_is_given(name: str) -> None:
    assert "hook" in reasons(repfx.fuse(ready(TRAPS[name]())))


def test_an_untouched_block_beside_is_fused() -> None:
    fused = repfx.fuse(ready(TRAPS["a hook of an object that the model holds"]()))
    assert [path for path in norms(fused) if path.startswith("last")] == []


# ---- hooks that only watch


def test_hooks_that_write_outside_cost_nothing_around_them() -> None:
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), Block(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)))
    seen: list[Any] = []
    model[2].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    fused = repfx.fuse(model)
    assert not any(path in norms(fused) for path in ("1", "4"))
    assert error_of(fused, model, image()) < 1e-12
    assert len(seen) == 2


def test_an_object_around_the_model_costs_nothing() -> None:
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), Block()))
    Watcher(model, model[2])
    fused = repfx.fuse(model)
    assert isinstance(fused, fx.GraphModule)
    assert "1" not in norms(fused)
    assert error_of(fused, model, image()) < 1e-12


def test_torch_s_own_hooks_cost_nothing_around_them() -> None:
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), Block()))
    prune.identity(model[2].conv, "weight")
    model.requires_grad_(False)
    try:
        fused = repfx.fuse(model)
    except InvalidInput:
        return
    assert "1" not in norms(fused)


def test_a_graph_keeps_its_hooks_when_it_is_copied() -> None:
    model = repfx.fuse(ready(Block()))
    seen: list[Any] = []
    model.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    model.register_forward_pre_hook(lambda module, args, named: seen.append(named), with_kwargs=True)
    expanded = repfx.expand(model, "acb")
    expanded(image())
    assert len(seen) == 2

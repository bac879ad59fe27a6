"""Chance in code: a model draws the same numbers after every verb as before it, and no verb moves the state of random numbers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.algebra.layers import is_batch_norm
from repfx.errors import RepfxError
from repfx.passes.calibrate import calibrate
from repfx.passes.freeze import freeze
from repfx.passes.gate import gate, ungate
from repfx.tracing.trace import trace
from tests.inline_net import Net, norms, ready, reasons
from tests.random_numbers import numbers_from
from tests.small_net import small_net
from tests.tracing.traps import chance
from tests.tracing.traps.chance import OF_THIS_FILE, DropsLayersByAGlobal, DropsLayersInside
from tests.tracing.traps.parts import Block

CHANCE = chance.TRAPS


def outputs(model: nn.Module) -> Tensor:
    """The outputs of a model in training mode for many seeds, with its BatchNorms in eval mode."""
    model = copy.deepcopy(model).train()
    for norm in filter(is_batch_norm, model.modules()):
        norm.eval()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, generator=numbers_from(3))
    return torch.stack([seeded(seed, model, x) for seed in range(12)])


@torch.no_grad()
def seeded(seed: int, model: nn.Module, x: Tensor) -> Tensor:
    chance.seed(seed)
    for inner in model.modules():
        if isinstance(inner, chance.DropsLayers):
            inner.of_python.seed(seed)
            inner.of_numpy.seed(seed)
            inner.of_torch.manual_seed(seed)
    result: Tensor = model(x)
    return result


def squeezed(model: nn.Module) -> Any:
    return repfx.squeeze(copy.deepcopy(model).train(), statistics="frozen")


VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "fuse": repfx.fuse,
    "expand": lambda model: repfx.expand(model, "acb"),
    "expand, fuse": lambda model: repfx.fuse(repfx.expand(model, "dbb")),
    "fuse, restore": lambda model: repfx.restore(repfx.fuse(model)),
    "squeeze": squeezed,
    "expand, squeeze": lambda model: squeezed(repfx.expand(model, "acb")),
    "squeeze, fuse": lambda model: repfx.fuse(squeezed(model)),
    "squeeze, unsqueeze": lambda model: repfx.unsqueeze(squeezed(model)),
}


@pytest.mark.slow_one_in(14)
@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "verb",
    [verb if verb in ("fuse", "squeeze") else pytest.param(verb, marks=pytest.mark.slow) for verb in VERBS],
)
@pytest.mark.parametrize("name", CHANCE)
def test_training_mode_draws_what_it_drew(name: str, verb: str) -> None:
    model = ready(CHANCE[name]())
    random.seed(4)
    expected = outputs(model)
    assert len({round(float(each.sum()), 9) for each in expected}) > 1
    found = outputs(VERBS[verb](model))
    assert float((found - expected).abs().max()) < 1e-9 * float(expected.abs().max())


@pytest.mark.parametrize("name", CHANCE)
def test_the_parts_are_fused_and_the_reason_is_given(name: str) -> None:
    fused = repfx.fuse(ready(CHANCE[name]()))
    assert norms(fused) == []
    assert "can't be traced: it draws random numbers in code" in reasons(fused)


def test_only_the_part_that_draws_is_left_as_it_is() -> None:
    model = DropsLayersInside(lambda m: random.random() < 0.3)
    traces = trace(model)
    assert [island.path for island in traces.islands if not island.path.startswith("middle")] == [""]
    assert list(traces.untraced) == ["middle"]


def test_a_draw_between_two_parts_is_their_parent_s() -> None:
    def function(m: Any, x: Any) -> Any:
        x = m.a(x)
        return m.b(x) if random.random() < 2 else x

    model = nn.Sequential(Net(function, a=Block(), b=Block()), Block())
    assert list(trace(model).untraced) == ["0"]


# ---- the state of random numbers


@pytest.fixture
def states() -> Callable[[], tuple[Any, ...]]:
    """The states of all generators, as values that compare."""
    random.seed(7)
    np.random.seed(8)
    torch.manual_seed(9)
    np.random.normal()  # leaves a second number that the next call gives

    def read() -> tuple[Any, ...]:
        own = OF_THIS_FILE.bit_generator.state
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), str(own)

    return read


def expanded() -> Any:
    return repfx.expand(ready(small_net()), "acb")


def block_of(model: nn.Module) -> Any:
    found = (path for path, module in model.named_modules() if isinstance(module, repfx.RepBlock))
    return next(found)


def batches() -> Any:
    """Batches whose making draws from all generators."""
    for _ in range(2):
        random.random(), np.random.rand()
        yield torch.randn(2, 3, 16, 16, dtype=torch.float64)


ALL: dict[str, Callable[[nn.Module], Any]] = {
    **VERBS,
    "expand as in the papers": lambda model: repfx.expand(model, "odbb", preserve=False),
    "sites": repfx.sites,
    "report": repfx.report,
    "check_equivalent": lambda model: repfx.check_equivalent(model, copy.deepcopy(model), torch.ones(2, 4, 5, 6)),
}
ON_BLOCKS: dict[str, Callable[[nn.Module], Any]] = {
    "drop": lambda model: repfx.drop(model, block_of(model), "1xk"),
    "drop, measured": lambda model: repfx.drop(model, block_of(model), "1xk", calibrate=batches()),
    "expand, measured": lambda model: repfx.expand(repfx.fuse(model), "dbb", calibrate=batches()),
    "restore, measured": lambda model: repfx.restore(repfx.fuse(model), calibrate=batches()),
    "calibrate": lambda model: calibrate(model, batches()),
    "freeze": lambda model: freeze(model, block_of(model)),
    "gate": lambda model: gate(model, block_of(model)),
    "ungate": lambda model: ungate(gate(model, block_of(model), "sigmoid"), block_of(model)),
}


@pytest.mark.slow_one_in(6)
@pytest.mark.one_in(5)
@pytest.mark.parametrize("verb", ALL)
@pytest.mark.parametrize(
    "name", ["layers dropped by numpy's normal", "… in a part, by torch", "a number drawn in both modes"]
)
def test_no_verb_moves_the_state(name: str, verb: str, states: Callable[[], tuple[Any, ...]]) -> None:
    model = ready(CHANCE[name]())
    before = states()
    ALL[verb](model)
    assert states() == before


@pytest.mark.parametrize("verb", ON_BLOCKS)
def test_no_verb_on_blocks_moves_the_state(verb: str, states: Callable[[], tuple[Any, ...]]) -> None:
    model = expanded()
    before = states()
    ON_BLOCKS[verb](model)
    assert states() == before


@pytest.mark.slow_one_in(4)
@pytest.mark.one_in(4)
@pytest.mark.parametrize("verb", ALL)
def test_no_verb_moves_a_generator_of_the_code(verb: str, states: Callable[[], tuple[Any, ...]]) -> None:
    model = ready(
        nn.Sequential(
            DropsLayersByAGlobal(), DropsLayersInside(chance.SOURCES["a generator of Python's as an attribute"])
        )
    )
    before = states(), model[1].middle.of_python.getstate()
    try:
        ALL[verb](model)
    finally:
        assert (states(), model[1].middle.of_python.getstate()) == before


def fails(model: nn.Module) -> None:
    """Expand with data that run out of memory after a draw."""

    def data() -> Any:
        random.random(), np.random.rand(), torch.rand(1)
        raise MemoryError
        yield

    repfx.expand(model, "acb", calibrate=data())


@pytest.mark.parametrize(
    "verb", [fails, lambda model: repfx.fuse(model, strict=True), lambda model: repfx.drop(model, "0", "x")]
)
def test_no_verb_moves_the_state_if_it_fails(verb: Any, states: Callable[[], tuple[Any, ...]]) -> None:
    model = ready(CHANCE["layers dropped by numpy"]())
    before = states()
    with pytest.raises((RepfxError, MemoryError)):
        verb(model)
    assert states() == before


def test_loading_structure_draws_nothing(tmp_path: Any, states: Callable[[], tuple[Any, ...]]) -> None:
    repfx.save(tmp_path / "run.ckpt", repfx.expand(small_net(), "dbb"))
    model = small_net()
    before = states()
    repfx.load(tmp_path / "run.ckpt", model, random_state=False)
    assert states() == before


def test_equal_seeds_still_give_equal_branches() -> None:
    model = small_net()
    weights = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        weights.append(repfx.expand(model, "dbb", preserve=False).get_submodule("plain").branches["1x1"].conv.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])

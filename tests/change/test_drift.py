"""No action changes a model's outputs: neither at once nor in later training passes, in which BatchNorms go on averaging."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn

import repfx
from benchmarks.drift import GAMMA, drift, outputs, reset, settle, subject
from repfx.blocks.branch import fitting
from repfx.blocks.presets import resolve_spec
from repfx.passes.drop import Drop
from repfx.passes.expand import Expand
from repfx.passes.freeze import Freeze
from repfx.passes.fuse import Fuse
from repfx.passes.restore import Restore
from repfx.records.journal import Action, apply
from repfx.testing import relative_error

SITES = 4
Case: TypeAlias = tuple[
    nn.Module, nn.Module, list[Tensor], list[Tensor]
]  # plain model, grown model, data that it has seen, data for the passes


def grow(model: nn.Module, **beginning: Any) -> list[Action]:
    """Expand the first of the larger convs."""
    wanted = resolve_spec("dyrep").branches_for
    found = [site for site in repfx.sites(model) if site.conv is not None and not site.conv.is_pointwise][:SITES]
    return [Expand(site.path, fitting(wanted(site.conv), site.conv)[0], **beginning) for site in found if site.conv]


def blocks(model: nn.Module) -> dict[str, repfx.RepBlock]:
    return {path: module for path, module in model.named_modules() if isinstance(module, repfx.RepBlock)}


ACTIONS: dict[str, Callable[[nn.Module], list[Action]]] = {
    "expand with γ": lambda model: grow(model, gamma=GAMMA),
    "expand with λ": lambda model: grow(model, attach_rate=0.0, weights="small"),
    "freeze": lambda model: [Freeze(path) for path in blocks(model)],
    "drop one": lambda model: [Drop(path, next(iter(block.branches))) for path, block in blocks(model).items()],
    "drop all": lambda model: [Drop(path, name) for path, block in blocks(model).items() for name in block.branches],
    "fuse": lambda model: [Fuse(path) for path in blocks(model)],
    "fuse and restore": lambda model: [each(path) for each in (Fuse, Restore) for path in blocks(model)],
}


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "mobilenet_v2")]


@pytest.fixture(scope="module", params=["dilated", "reflect-padded", *LARGE])
def plain_and_grown(request: pytest.FixtureRequest) -> Case:
    """A model, its copy with blocks whose branches have learnt something, and data."""
    plain, seen, fresh = subject(request.param, 6)
    grown = copy.deepcopy(plain)
    apply(grown, grow(grown, gamma=1.0), seen)
    settle(grown, seen)
    return plain, grown, seen, fresh


@pytest.fixture(scope="module")
def drifts(plain_and_grown: Case) -> dict[nn.Module, float]:
    """How far the plain and the grown model move without any action."""
    plain, grown, _, fresh = plain_and_grown
    return {model: drift(model, fresh) for model in (plain, grown)}


@pytest.mark.slow_one_in(4)
@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_moves_nothing(name: str, plain_and_grown: Case, drifts: dict[nn.Module, float]) -> None:
    plain, grown, seen, fresh = plain_and_grown
    before = plain if name.startswith("expand") else grown
    after = copy.deepcopy(before)
    actions = ACTIONS[name](after)
    assert len(actions) >= SITES - 1
    apply(after, actions, seen)
    assert relative_error(outputs(after, fresh[0])["eval"], outputs(before, fresh[0])["eval"]) < 1e-9
    assert drift(after, fresh) < 1.5 * drifts[before]


@pytest.mark.slow
def test_a_reset_of_the_own_batch_norm_inside_its_block_drifts() -> None:
    model, seen, fresh = subject("dilated", 6)
    before = drift(model, fresh)
    apply(model, grow(model, gamma=GAMMA), seen)
    assert relative_error(reset(model).eval()(fresh[0]), model.eval()(fresh[0])) < 1e-9
    assert drift(model, fresh) < 1.1 * before
    assert drift(reset(model), fresh) > 5 * before


@pytest.mark.slow
def test_in_the_structure_of_dyrep_s_authors_a_reset_moves_eval_mode_for_a_while() -> None:
    model, seen, fresh = subject("dilated", 2)
    plain, before = copy.deepcopy(model), drift(model, fresh)
    apply(model, grow(model, gamma=GAMMA, norm_behind=True), seen)
    assert drift(model, fresh) < 1.1 * before
    changed, x = reset(model), fresh[0]
    assert relative_error(outputs(changed, x)["eval"], outputs(plain, x)["eval"]) < 1e-9
    assert relative_error(outputs(changed, x)["train"], outputs(plain, x)["train"]) < 0.01
    assert drift(changed, fresh) > 0.3
    assert drift(changed, fresh, 60) < 0.1


@pytest.mark.slow
def test_statistics_of_the_sum_alone_would_move_it() -> None:
    """Outputs of branches are correlated, so the statistics that `drop` derives without data differ from those it measures."""
    model, seen, fresh = subject("dilated", 6)
    apply(model, grow(model, gamma=1.0), seen)
    with torch.no_grad():
        for block in blocks(model).values():
            block.branches["1x1"].conv.weight.copy_(block.conv.weight.mean((2, 3), keepdim=True))  # type: ignore[union-attr, operator]
    settle(model, seen)
    before, actions = drift(model, fresh), ACTIONS["drop all"](model)
    inherited = copy.deepcopy(model)
    apply(inherited, actions, None)
    apply(model, actions, seen)
    assert relative_error(inherited.eval()(fresh[0]), model.eval()(fresh[0])) < 1e-9
    assert drift(inherited, fresh) > 3 * before
    assert drift(model, fresh) < 1.5 * before

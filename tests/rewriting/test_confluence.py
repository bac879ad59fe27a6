"""`fuse` gives one result in whatever order rules are tried, because at no node more than one of them has a match."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import repfx
from repfx.records.report import Skip
from repfx.rewriting.match import Match
from repfx.rewriting.pipeline import rewrite
from repfx.rewriting.rule import RULES, Rule
from repfx.rewriting.view import View
from repfx.testing import TOLERANCE, randomize_batch_norm, relative_error
from tests.foreign_blocks.table import BLOCKS
from tests.random_net import RandomNet, random_nets
from tests.small_net import small_net

ORDERS = st.permutations(sorted(RULES))


def fused(model: nn.Module, order: Sequence[str]) -> nn.Module:
    """Fuse a model with rules tried in this order."""
    return rewrite(model, [RULES[name] for name in order], "fuse").model


def layers(model: nn.Module) -> dict[str, str]:
    """The layers of a model by path, with their sizes."""
    return {path: str(module) for path, module in model.named_modules() if not any(True for _ in module.children())}


def differences(a: nn.Module, b: nn.Module) -> list[str]:
    """The differences of two fused models: layers by path, and numbers by more than what another order of additions explains."""
    found = [f"{path}: {layers(a).get(path)}, {layers(b).get(path)}" for path in {*layers(a)} ^ {*layers(b)}]
    found += [path for path, layer in layers(a).items() if layers(b).get(path, layer) != layer]
    tensors, others = dict(a.state_dict()), dict(b.state_dict())
    for name in tensors.keys() & others.keys():
        if isinstance(tensors[name], Tensor) and tensors[name].is_floating_point() and tensors[name].numel():
            same = tensors[name].shape == others[name].shape
            found += [] if same and relative_error(tensors[name], others[name]) <= TOLERANCE else [name]
    return found


@pytest.mark.slow
@given(random_nets(), ORDERS)
def test_random_nets_become_the_same_in_any_order(model: RandomNet, order: Sequence[str]) -> None:
    assert not differences(repfx.fuse(model), fused(model, order))


@pytest.mark.slow_one_in(5)
@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", BLOCKS)
def test_foreign_blocks_become_the_same_in_any_order(name: str) -> None:
    model = randomize_batch_norm(BLOCKS[name][0]().double().eval())
    expected, numbers = repfx.fuse(model), random.Random(name)
    for order in (sorted(RULES), sorted(RULES, reverse=True), numbers.sample(sorted(RULES), len(RULES))):
        assert not differences(expected, fused(model, order))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["dbb", "ireps", "orepa", "qarepvgg"])
def test_expanded_nets_become_the_same_in_any_order(preset: str) -> None:
    model = randomize_batch_norm(repfx.expand(small_net(), preset, preserve=False)).eval()
    assert not differences(repfx.fuse(model), fused(model, sorted(RULES, reverse=True)))


@dataclass(frozen=True)
class Alone:
    """A rule that asks all the others, too, and raises if another one has a match at the same node."""

    rule: Rule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    def find(self, node: fx.Node, view: View) -> Match | Skip | None:
        """Find what the rule finds."""
        found = {name: rule.find(node, view) for name, rule in RULES.items()}
        matching = [name for name, match in found.items() if isinstance(match, Match)]
        assert len(matching) <= 1, f"{matching} all match at {node.name}"
        return found[self.rule.name]


@pytest.mark.slow
@given(random_nets())
def test_at_most_one_rule_matches_at_a_node(model: RandomNet) -> None:
    rules: list[Any] = [Alone(rule) for rule in RULES.values()]
    assert not differences(rewrite(model, rules, "fuse").model, repfx.fuse(model))


@pytest.mark.parametrize("name", BLOCKS)
def test_at_most_one_rule_matches_at_a_node_of_a_foreign_block(name: str) -> None:
    rules: list[Any] = [Alone(rule) for rule in RULES.values()]
    rewrite(BLOCKS[name][0]().eval(), rules, "fuse")


def test_other_layers_and_other_numbers_are_told_apart() -> None:
    model = repfx.expand(small_net(), "repvgg").eval()
    without = fused(model, [name for name in RULES if name != "merge_parallel"])
    assert differences(repfx.fuse(model), without)
    other: Any = repfx.fuse(model)
    with torch.no_grad():
        other.get_submodule("stem").weight.mul_(1 + 1e-6)
    assert differences(repfx.fuse(model), other) == ["stem.weight"]

"""Verbs on one model in any order: those that must keep the function keep it, and the table of sites is right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import repfx
from repfx.blocks.branch import KINDS
from repfx.blocks.presets import PRESETS
from repfx.testing import TOLERANCE, randomize_batch_norm, relative_error
from tests.small_net import SmallNet, batch

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")

SPECS = st.one_of(st.sampled_from(sorted(PRESETS)), st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3))
PATTERNS = st.sampled_from(("stem", "plain", "depthwise", "*", "[ps]*"))
X = batch(3)


class Verbs(RuleBasedStateMachine):
    """A `SmallNet` under the verbs. `expected` is its last eval output, taken anew only after rules that may change it."""

    model: Any
    expected: Tensor
    origins: dict[str, nn.Parameter]

    @initialize(seed=st.integers(0, 99))
    def start(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = randomize_batch_norm(SmallNet().double(), seed)
        self.measure()

    @torch.no_grad()
    def output(self) -> Tensor:
        modes = [(module, module.training) for module in self.model.modules()]
        output: Tensor = self.model.eval()(X)
        for module, training in modes:
            module.training = training
        return output

    def measure(self) -> None:
        """Take the model's present output as the one that later rules must keep."""
        self.expected = self.output()
        self.origins = {path: conv.weight for path, conv in self.convs().items()}

    def convs(self) -> dict[str, Any]:
        """The convs of the sites by path, also those inside blocks."""
        found = {path: self.model.get_submodule(path) for path in ("stem", "plain", "depthwise")}
        return {path: site.conv if isinstance(site, repfx.RepBlock) else site for path, site in found.items()}

    def blocks(self) -> dict[str, repfx.RepBlock]:
        return {path: module for path, module in self.model.named_modules() if isinstance(module, repfx.RepBlock)}

    # ---- verbs that change the model in place

    @rule(pattern=PATTERNS, spec=SPECS, calibrated=st.booleans())
    def expand(self, pattern: str, spec: Any, calibrated: bool) -> None:
        before = self.blocks()
        calibrate = [batch(2, seed=5)] if calibrated else None
        model = repfx.expand(self.model, {pattern: spec}, inplace=True, calibrate=calibrate)
        assert model is self.model
        assert all(self.blocks()[path] is block for path, block in before.items())

    @precondition(lambda self: self.blocks())
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        site = data.draw(st.sampled_from(sorted(self.blocks())))
        branch = data.draw(st.sampled_from(sorted(self.blocks()[site].branches)))
        left = self.blocks()[site].branches.keys() - {branch}
        assert repfx.drop(self.model, site, branch) is self.model
        assert (self.blocks()[site].branches.keys() if site in self.blocks() else set()) == left

    # ---- verbs that give a new model

    @rule()
    def fuse_and_restore(self) -> None:
        """Fuse to a plain model, whose state dict the original class loads."""
        fused: Any = repfx.fuse(self.model)
        assert relative_error(fused.eval()(X), self.expected) < TOLERANCE
        assert not any(isinstance(module, repfx.RepBlock) for module in fused.modules())
        restored = repfx.restore(fused)
        self.model = SmallNet().double()
        self.model.load_state_dict(restored.state_dict(), strict=True)
        self.origins = {path: conv.weight for path, conv in self.convs().items()}

    @rule()
    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)
        self.origins = {path: conv.weight for path, conv in self.convs().items()}

    # ---- what moves the weights

    @rule(seed=st.integers(0, 99))
    def train(self, seed: int) -> None:
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.model(batch(4, seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        self.measure()

    @rule()
    def carry_state_over(self) -> None:
        """Load the state dict into a copy with other weights, and go on with the copy."""
        other = copy.deepcopy(self.model)
        with torch.no_grad():
            for tensor in other.state_dict().values():
                tensor.zero_()
        other.load_state_dict(self.model.state_dict(), strict=True)
        self.model = other
        self.origins = {path: conv.weight for path, conv in self.convs().items()}

    @rule(training=st.booleans())
    def switch_mode(self, training: bool) -> None:
        self.model.train(training)

    # ---- what holds at any time

    @invariant()
    def the_function_is_kept(self) -> None:
        assert relative_error(self.output(), self.expected) < TOLERANCE

    @invariant()
    def the_convs_of_the_sites_keep_their_parameters(self) -> None:
        assert all(conv.weight is self.origins[path] for path, conv in self.convs().items())

    @invariant()
    def the_table_shows_the_blocks(self) -> None:
        shown = {site.path: set(site.branches) for site in repfx.sites(self.model) if site.branches}
        assert shown == {path: set(block.branches) for path, block in self.blocks().items()}

    @invariant()
    def every_module_is_in_the_mode_of_the_model(self) -> None:
        assert {module.training for module in self.model.modules()} == {self.model.training}


Verbs.TestCase.settings = settings(max_examples=20, stateful_step_count=8)
TestVerbs = pytest.mark.slow(Verbs.TestCase)

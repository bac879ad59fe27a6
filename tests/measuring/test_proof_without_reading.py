"""Proofs don't lean on what was read: with the readers of code off, verbs with an example still give the same output, or an error."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
import repfx.tracing.sites
import repfx.tracing.trace
from repfx.errors import EquivalenceError, RepfxError
from repfx.reading.source_code import Around
from repfx.testing import randomize_batch_norm
from tests.random_numbers import numbers_from
from tests.tracing.traps import TRAPS, chance

pytestmark = pytest.mark.slow


def drop_all(model: nn.Module, example: Any) -> nn.Module:
    """Expand without a proof, then drop branches with one."""
    expanded = randomize_batch_norm(repfx.expand(model, "acb"))
    expected = copy.deepcopy(expanded)
    for path, block in list(expanded.named_modules()):
        for branch in list(block.branches) if isinstance(block, repfx.RepBlock) else ():
            repfx.drop(expanded, path, branch, example=example)
    return Pair(expanded, expected)


class Pair(nn.Module):
    """The result of a verb, and a model that computes what it should."""

    def __init__(self, made: nn.Module, expected: nn.Module) -> None:
        super().__init__()
        self.made, self.expected = made, expected


VERBS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "expand": lambda model, example: repfx.expand(model, "acb", example=example),
    "fuse": lambda model, example: repfx.fuse(model, example=example),
    "restore": lambda model, example: repfx.restore(repfx.fuse(model, example=example), example=example),
    "squeeze": lambda model, example: repfx.squeeze(copy.deepcopy(model), statistics="frozen", example=example),
    "drop": drop_all,
}


@pytest.fixture
def _without_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Around, "inside", lambda self, *args, **options: self)
    monkeypatch.setattr(Around, "reason", lambda self, module: None)
    monkeypatch.setattr(Around, "other_arguments", lambda self, module: None)
    monkeypatch.setattr(repfx.tracing.trace, "kept_in", lambda model: {})
    monkeypatch.setattr(repfx.tracing.trace, "read_by_code", lambda model: {})


@pytest.mark.slow_one_in(5)
@pytest.mark.usefixtures("_without_reading")
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_with_an_example_is_right_or_an_error(verb: str) -> None:
    answers: Counter[str] = Counter()
    for name, make in TRAPS.items():
        model = randomize_batch_norm(make().double())
        model.eval()  # which may return None
        example = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=numbers_from(1))
        answers[answer(VERBS[verb], model, example, f"{verb} of {name}")] += 1
    assert len(TRAPS) >= 200
    assert answers["equal"] >= 50, answers
    if verb != "squeeze":
        assert answers["proof failed"] >= 5, answers  # the readers are off, so the proofs have something to do


def answer(verb: Callable[[nn.Module, Tensor], nn.Module], model: nn.Module, example: Tensor, where: str) -> str:
    """Run a verb. Tell how it ended, after checking that what it gave or left is right."""
    chance.seed(0)
    expected = copy.deepcopy(model)(example)
    result = "equal"
    try:
        made = verb(model, example)
    except EquivalenceError:
        made, result = model, "proof failed"
    except RepfxError:
        made, result = model, "refused"
    if isinstance(made, Pair):
        chance.seed(0)
        expected, made = made.expected(example), made.made
    chance.seed(0)
    found = copy.deepcopy(made)(example)
    assert float((found - expected).abs().max()) <= 1e-9 * float(expected.abs().max()), where
    return result

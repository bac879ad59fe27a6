"""Verbs with an example prove what they did: a wrong result is an error that names a module, and the model is as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.algebra.layers import is_batch_norm
from repfx.errors import EquivalenceError, InvalidInput
from repfx.measuring.proof import prove
from repfx.records.snapshot import Snapshot
from repfx.testing import assert_same_map, randomize_batch_norm
from tests.inline_net import image, same_state
from tests.small_net import batch, small_net

Verb = Callable[..., nn.Module]


def trained_blocks() -> nn.Module:
    """A net with blocks whose branches add something."""
    return randomize_batch_norm(repfx.expand(small_net(), {"stem": "dbb", "depthwise": "acb"}), seed=3).eval()


VERBS: dict[str, tuple[Callable[[], nn.Module], Verb]] = {
    "expand": (lambda: small_net().eval(), lambda model, **options: repfx.expand(model, "dbb", **options)),
    "expand in place": (
        lambda: small_net().eval(),
        lambda model, **options: repfx.expand(model, "dbb", inplace=True, **options),
    ),
    "fuse": (trained_blocks, repfx.fuse),
    "restore": (lambda: repfx.fuse(trained_blocks()), repfx.restore),
    "drop": (trained_blocks, lambda model, **options: repfx.drop(model, "stem", "1x1", **options)),
    "squeeze": (trained_blocks, lambda model, **options: repfx.squeeze(model, **options)),
    "squeeze, held": (
        trained_blocks,
        lambda model, **options: repfx.squeeze(model, statistics="frozen", **options),
    ),
}


@pytest.mark.parametrize("name", VERBS)
def test_a_right_result_is_given_out(name: str) -> None:
    build, verb = VERBS[name]
    model = build()
    reference = copy.deepcopy(model)
    assert_same_map(verb(model, example=batch()).eval(), reference, batch(seed=4))


def spoil(model: nn.Module) -> None:
    """Move the shift of the last BatchNorm, or the bias of the last layer."""
    layers: list[Any] = [module for module in model.modules() if is_batch_norm(module) or isinstance(module, nn.Linear)]
    with torch.no_grad():
        layers[-1].bias.add_(1e-3)


@pytest.mark.parametrize("name", VERBS)
def test_a_wrong_result_is_an_error_and_the_model_is_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, verb = VERBS[name]
    model = build()
    modules = dict(model.named_modules())
    tensors = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    state, shown, journal, report = (
        copy.deepcopy(model.state_dict()),
        str(model),
        repfx.journal(model),
        repfx.report(model),
    )
    for module in ("expand", "fuse", "restore", "drop", "squeeze"):
        code = __import__(f"repfx.passes.{module}", fromlist=["x"])
        patched = [key for key in ("prove", "proven") if key in vars(code)]
        for key in patched:
            monkeypatch.setattr(code, key, spoiled(vars(code)[key]))
    with pytest.raises(
        EquivalenceError, match=r"would change the model's output: worst relative difference .*differs is '\w"
    ):
        verb(model, example=batch())
    assert same_state(state, model.state_dict())
    assert str(model) == shown
    assert dict(model.named_modules()) == modules
    assert {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())} == tensors
    assert (repfx.journal(model), repfx.report(model)) == (journal, report)


def spoiled(proof: Any) -> Any:
    """A proof before which somebody's mistake happens to what is proven."""

    @contextmanager
    def proven(verb: str, model: nn.Module, example: Any, **options: Any) -> Any:
        with proof(verb, model, example, **options):
            yield
            spoil(model)

    def prove(verb: str, before: nn.Module, after: nn.Module, example: Any, **options: Any) -> None:
        spoil(after)
        proof(verb, before, after, example, **options)

    return proven if proof.__name__ == "proven" else prove


class Scaled(nn.Module):
    """A conv, times a factor of the code's own in each mode."""

    def __init__(self, in_training: float, in_eval: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.factors = {True: in_training, False: in_eval}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) * self.factors[self.training]
        return y


def scaled(in_training: float, in_eval: float) -> nn.Module:
    torch.manual_seed(0)
    return Scaled(in_training, in_eval).double()


def test_what_differs_in_no_module_inside_is_laid_to_the_code_around() -> None:
    with pytest.raises(
        EquivalenceError, match=r"No module inside differs, so code of Scaled does\. The model is as it was\."
    ):
        prove("fuse", scaled(1, 1), scaled(1, 2), image())


def test_training_mode_is_proven_where_it_is_meant_to_stay() -> None:
    prove("fuse", scaled(1, 1), scaled(2, 1), image())
    with pytest.raises(EquivalenceError, match="'expand' would change the model's output in training mode: worst"):
        prove("expand", scaled(1, 1), scaled(2, 1), image(), in_training=True)


class Drawing(Scaled):
    """A conv, times a number that the code draws."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (random.random() if self.training else 1)


def test_training_mode_is_not_compared_where_numbers_are_drawn_or_nothing_can_run() -> None:
    model = Drawing(1, 1).double()
    prove("expand", model, copy.deepcopy(model), image(), in_training=True)
    single = nn.Sequential(
        nn.Conv2d(4, 4, (9, 10)), nn.BatchNorm2d(4)
    ).double()  # one number a channel can't be normalised
    prove("expand", single, copy.deepcopy(single), image()[:1], in_training=True)


def test_an_example_and_another_function_exclude_each_other() -> None:
    with pytest.raises(InvalidInput, match="which preserve=False doesn't let"):
        repfx.expand(small_net(), "dbb", preserve=False, example=batch())


@pytest.mark.parametrize("verb", [repfx.fuse, lambda model, example: repfx.expand(model, "acb", example=example)])
def test_an_example_that_the_model_can_t_take_is_named(verb: Any) -> None:
    with pytest.raises(InvalidInput, match=r"SmallNet, can't run on x = float64 \[2, 5, 9, 7\]"):
        verb(small_net().eval(), example=torch.randn(2, 5, 9, 7).double())


def test_a_snapshot_gives_back_what_was_there() -> None:
    model: Any = trained_blocks()
    before, state = Snapshot(model), copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    weight = model.stem.conv.weight
    repfx.squeeze(model, statistics="frozen")
    repfx.drop(model, "stem", "1x1")
    model.extra, model.plain.stride, weight.grad = nn.ReLU(), (5, 5), torch.ones_like(weight)
    weight.data = torch.zeros(1)
    before.put_back()
    assert same_state(state, model.state_dict())
    assert [name for name, _ in model.named_modules()] == names
    assert (model.stem.conv.weight is weight, model.plain.stride, weight.grad) == (True, (1, 1), None)
    assert not hasattr(model, "extra")

"""Hooks of every kind go along when a module is copied, and those of the copy see the copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import repfx
from repfx.records.copied_hooks import _HOOKS
from repfx.records.notes import copy_of
from tests.inline_net import image, ready

REGISTER: dict[str, Callable[[nn.Module, Any], Any]] = {
    "_forward_pre_hooks": lambda module, hook: module.register_forward_pre_hook(hook, with_kwargs=True),
    "_forward_hooks": lambda module, hook: module.register_forward_hook(hook, with_kwargs=True, always_call=True),
    "_backward_pre_hooks": lambda module, hook: module.register_full_backward_pre_hook(hook),
    "_backward_hooks": lambda module, hook: module.register_full_backward_hook(hook),
}
SETTINGS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_is_full_backward_hook",
)


def closing_over(model: nn.Module) -> Any:
    def hook(*_: Any) -> None:
        held.append(model)

    held: list[Any] = []
    return hook


def with_a_default(model: nn.Module) -> Any:
    def hook(*_: Any, **__: Any) -> None: ...

    hook.__defaults__ = (model,)
    return hook


def with_a_keyword(model: nn.Module) -> Any:
    def hook(*_: Any, owner: Any = model) -> None: ...

    return hook


def modules_of(hook: Any) -> list[nn.Module]:
    held = [cell.cell_contents for cell in hook.__closure__ or ()]
    held += [*(hook.__defaults__ or ()), *(hook.__kwdefaults__ or {}).values()]
    return [each for each in held if isinstance(each, nn.Module)]


@pytest.mark.parametrize("make", [closing_over, with_a_default, with_a_keyword])
@pytest.mark.parametrize("kind", REGISTER)
def test_a_copied_hook_holds_the_copy(kind: str, make: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    REGISTER[kind](model, make(model))
    copied = copy_of(model)
    (hook,) = vars(copied)[kind].values()
    assert [each is copied for each in modules_of(hook)] == [True]
    (own,) = vars(model)[kind].values()
    assert [each is model for each in modules_of(own)] == [True]


@pytest.mark.parametrize("kind", REGISTER)
def test_a_copied_graph_keeps_its_hook_and_how_it_is_called(kind: str) -> None:
    graph: Any = repfx.fuse(ready(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))))
    calls: list[str] = []
    REGISTER[kind](graph, lambda *_: calls.append(kind))
    copied = copy_of(graph)
    assert len(vars(copied)[kind]) == 1
    for name in SETTINGS:
        assert vars(copied)[name] == vars(graph)[name]
    x = image().requires_grad_()
    copied(x).sum().backward()
    assert calls == [kind]


def test_a_hook_of_a_copied_graph_is_called_even_if_forward_fails() -> None:
    graph: Any = repfx.fuse(ready(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))))
    calls: list[str] = []
    graph.register_forward_hook(lambda *_: calls.append("called"), always_call=True)
    with pytest.raises(RuntimeError):
        copy_of(graph)(torch.zeros(1, 3, 5, 6, dtype=torch.float64))
    assert calls == ["called"]


def test_every_kind_is_tried() -> None:
    assert tuple(REGISTER) == _HOOKS
    assert {name for name in vars(nn.Module()) if name.endswith("_hooks")} >= set(_HOOKS)


def test_a_partial_and_a_method_are_copied_with_what_they_hold() -> None:
    class Watches(nn.Sequential):
        def watch(self, *_: Any) -> None: ...

    model = Watches(nn.Conv2d(3, 4, 3))
    model.register_forward_hook(partial(print, model))
    model.register_forward_hook(model.watch)
    copied = copy_of(model)
    first, second = vars(copied)["_forward_hooks"].values()
    assert first.args[0] is copied
    assert second.__self__ is copied

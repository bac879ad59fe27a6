"""Settings of modules while code is traced: modes, layers' plain values, and which tensors and modules they hold.

A graph takes all of these for constant. So code that changes one can't be traced, and what it changed is put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

from repfx.algebra.layers import is_batch_norm, is_conv_or_linear

# for each module: what it holds, by name
Settings: TypeAlias = dict[nn.Module, dict[str, Any]]

_PLAIN = (bool, int, float, str, tuple, type(None))
_REGISTRIES = ("_parameters", "_buffers", "_modules")


def settings_in(module: nn.Module) -> Settings:
    """Return the settings of all modules in a module."""
    return {
        inner: {name: dict(value) if name in _REGISTRIES else value for name, value in _settings_of(inner).items()}
        for inner in module.modules()
    }


def changed_setting(module: nn.Module, before: Settings) -> str | None:
    """Return the name of a setting of a module that isn't what it was before, or None.

    >>> layer = nn.BatchNorm2d(4)
    >>> before = settings_in(layer)
    >>> changed_setting(layer, before), changed_setting(layer.eval(), before)
    (None, 'training')
    """
    known = before.get(module)
    if known is None:
        return None
    held = vars(module)
    for name, value in known.items():
        now = held.get(name)
        if now is not value and not _same(value, now if name in _REGISTRIES or isinstance(now, _PLAIN) else None):
            return name
    added = (name for name in held.keys() - known.keys() if held[name] is not None)
    return next((name for name in added if isinstance(held[name], _PLAIN)), None) if _is_read(module) else None


@contextmanager
def settings_put_back(before: Settings) -> Iterator[None]:
    """Give modules, at the end, the settings back that they had before."""
    try:
        yield
    finally:
        _put_back(before)


@contextmanager
def in_mode(module: nn.Module, training: bool, settings: Settings) -> Iterator[None]:
    """Put a module into one mode for a while, also in the settings against which changes are told."""
    inside = list(module.modules())
    before = [inner.training for inner in inside]
    _set_modes(inside, [training] * len(inside), settings)
    try:
        yield
    finally:
        _set_modes(inside, before, settings)


def _set_modes(modules: list[nn.Module], modes: list[bool], settings: Settings) -> None:
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode
        if module in settings:
            settings[module]["training"] = mode


def _put_back(before: Settings) -> None:
    for module, known in before.items():
        if changed_setting(module, before) is not None:
            for registry in _REGISTRIES:
                vars(module)[registry].clear()
                vars(module)[registry].update(known[registry])
            vars(module).update({name: value for name, value in known.items() if name not in _REGISTRIES})


def _settings_of(module: nn.Module) -> dict[str, Any]:
    held = vars(module)
    plain = held if _is_read(module) else {"training": module.training}
    found = {name: value for name, value in plain.items() if isinstance(value, _PLAIN)}
    return found | {registry: held[registry] for registry in _REGISTRIES}


def _is_read(module: nn.Module) -> bool:
    """Whether rules read a module's plain values."""
    return is_conv_or_linear(module) or is_batch_norm(module)


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, dict):
        return len(before) == len(now) and all(name in before and before[name] is value for name, value in now.items())
    return type(before) is type(now) and bool(before == now)

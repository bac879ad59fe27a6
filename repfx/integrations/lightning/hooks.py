"""`Before`: adds work before a LightningModule's own hooks. They alone see every checkpoint, and see it before its weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Before:
    """A function in the place of a hook of one LightningModule: calls `first`, then the hook. A copy of the module has the hook alone."""

    def __init__(self, module: Any, name: str, first: Callable[[Any, Any], None] | None) -> None:
        self._module = module
        self._name = name
        self._first = first

    def __call__(self, checkpoint: Any) -> None:
        if self._first is not None:
            self._first(self._module, checkpoint)
        getattr(type(self._module), self._name)(self._module, checkpoint)

    def __reduce__(self) -> Any:
        return Before, (self._module, self._name, None)

    @classmethod
    def hang(cls, module: Any, name: str, first: Callable[[Any, Any], None]) -> None:
        """Call `first` before a hook of the module, until `take_down`. It replaces a function that was hung there before."""
        vars(module)[name] = cls(module, name, first)

    @classmethod
    def take_down(cls, module: Any, name: str) -> None:
        """Give the module back its own hook."""
        vars(module).pop(name, None)

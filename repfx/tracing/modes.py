"""Modes of a thread that change what code computes and that a graph can't record: gradients and autocast.

They are read, not patched: each thread has its own, so what other threads do with theirs is not seen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class Modes:
    """The modes of this thread. `autocasts` counts the autocast regions around, those that switch it off among them."""

    gradients: bool
    autocasts: int
    enabled: tuple[bool, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def now(cls) -> Modes:
        enabled = tuple(map(torch.is_autocast_enabled, _DEVICES))
        dtypes = tuple(map(torch.get_autocast_dtype, _DEVICES))
        return cls(torch.is_grad_enabled(), _count_autocasts(), enabled, dtypes)

    def require(self) -> None:
        """Raise TypeError if code has switched a mode since."""
        found = Modes.now()
        if found.gradients != self.gradients:
            raise TypeError("it switches gradients on or off")
        if found != self:
            raise TypeError("it switches autocast on or off")


def _count_autocasts() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


@contextmanager
def modes_put_back() -> Iterator[Modes]:
    """Yield the modes of this thread, and put them back at the end, because code that is interrupted may leave them switched."""
    before = Modes.now()
    cached = torch.is_autocast_cache_enabled()
    try:
        yield before
    finally:
        torch.set_grad_enabled(before.gradients)
        for device, enabled, dtype in zip(_DEVICES, before.enabled, before.dtypes, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cached)
        for _ in range(_count_autocasts() - before.autocasts):
            torch.autocast_decrement_nesting()

"""How much a machine computes and moves in a second, by a quick measurement: the roof under which each layer stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from repfx.measuring.cost import measure_times
from repfx.profiling.layer_times import Work

_SIDE = 768
_BYTES = 1 << 27  # of a copy: more than a cache holds


@dataclass(frozen=True)
class Machine:
    """The roof of a machine, with the threads that torch uses.

    Args:
        macs: multiply-adds a second, in a product of large matrices.
        moved: bytes read and written a second, in a large copy.
    """

    macs: float
    moved: float

    @classmethod
    def measured(cls, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Machine:
        """Measure this machine. It takes about a second."""
        a = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
        source = torch.ones(_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        times = measure_times({"product": lambda: a @ a, "copy": lambda: target.copy_(source)}, rounds=10, limit=1.0)
        return cls(_SIDE**3 / min(times["product"]), 2 * _BYTES / min(times["copy"]))

    def limit(self, work: Work) -> str:
        """Say which roof is lower for a layer: that of arithmetic or that of memory.

        >>> Machine(macs=1e9, moved=1e9).limit(Work(macs=100, moved=10))
        'arithmetic'
        """
        return "arithmetic" if work.macs / self.macs > work.moved / self.moved else "memory"

    def least_seconds(self, work: Work) -> float:
        """Return the seconds that a layer takes at least, under both roofs.

        >>> Machine(macs=100.0, moved=10.0).least_seconds(Work(macs=100, moved=40))
        4.0
        """
        return max(work.macs / self.macs, work.moved / self.moved)

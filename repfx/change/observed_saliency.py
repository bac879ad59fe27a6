"""`ObservedSaliency`: the saliency of convs, summed over the steps of an epoch and over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from repfx.algebra.layers import Layer
from repfx.change.ranks import is_distributed
from repfx.change.saliency import METRICS
from repfx.errors import InvalidInput
from repfx.tracing.sites import Site


class ObservedSaliency:
    """Sums of saliency over steps. They stay on the device, so nothing waits for it until the means are asked for."""

    def __init__(self, sites: list[str], sums: Tensor | None = None, steps: Tensor | None = None) -> None:
        self.sites = sites
        self.sums = sums
        self.steps = steps

    @classmethod
    def of(cls, sites: Iterable[Site]) -> ObservedSaliency:
        return cls([site.path for site in sites])

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> ObservedSaliency:
        sites, sums, steps = list(state["sites"]), state["sums"], state["steps"]
        if sums.shape != (len(sites),) or steps.shape != () or not sums.is_floating_point():
            raise InvalidInput(f"it has {tuple(sums.shape)} sums of saliency for {len(sites)} convs")
        return cls(sites, sums.to(device), steps.to(device))

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.sums is None else {"sites": self.sites, "sums": self.sums, "steps": self.steps}

    @torch.no_grad()
    def add(self, metric: str, weights: Sequence[Layer], scaler: torch.amp.GradScaler | None) -> None:
        """Add one step, unless a gradient overflowed."""
        if not weights:
            return
        device = weights[0].device
        values = torch.stack([_value(metric, weight).to(device) for weight in weights])
        if scaler is not None:
            values = values / scaler.scale(torch.ones((), device=device))
        if self.sums is None or self.steps is None:
            self.sums, self.steps = torch.zeros_like(values), torch.zeros((), device=device)
        counts = values.isfinite().all()
        self.sums += torch.where(counts, values, torch.zeros_like(values))
        self.steps += counts

    def share(self) -> None:
        """Give each rank the mean of the sums of all ranks."""
        if self.sums is not None and self.steps is not None and is_distributed():
            for tensor in (self.sums, self.steps):
                torch.distributed.all_reduce(tensor)
                tensor /= torch.distributed.get_world_size()

    def means(self) -> dict[str, float]:
        """Return the mean saliency of each site over all steps and ranks."""
        if self.sums is None or self.steps is None:
            return {}
        total = torch.cat([self.sums, self.steps[None]])
        if is_distributed():
            torch.distributed.all_reduce(total)
        return dict(zip(self.sites, (total[:-1] / total[-1].clamp(min=1)).tolist()))


def _value(metric: str, weight: Tensor) -> Tensor:
    """Return the saliency of a weight, computed in float32 at least, so that float16 doesn't overflow."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.grad is None:
        return torch.zeros((), dtype=dtype, device=weight.device)
    return METRICS[metric](weight.to(dtype), weight.grad.to(dtype))

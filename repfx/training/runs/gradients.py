"""`Gradients`: how large the gradients of each path of the blocks are in an epoch (RepAn, figure 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repfx.blocks.block import ORIGIN, RepBlock


class Gradients:
    """Mean |gradient| over the weights of each path and over the steps of an epoch.

    Weights are those of convs and linear layers: parameters with more than one axis. Of a site's own conv, which may have become a block
    itself, they are the innermost conv's. Steps in which a path doesn't run don't count for it. Numbers stay on the device until they are
    asked for.

    >>> import repfx
    >>> model = repfx.expand(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)), ["1x1"])
    >>> gradients = Gradients()
    >>> model(torch.randn(2, 8, 6, 5)).square().sum().backward()
    >>> gradients.add(model)
    >>> sorted(gradients.means()["0"])
    ['1x1', 'origin']
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._steps: dict[tuple[str, str], int] = {}

    @torch.no_grad()
    def add(self, model: nn.Module, scaler: torch.amp.GradScaler | None = None) -> None:
        """Add the gradients of one step, which `backward` has just computed.

        Args:
            scaler: the scaler that the loss was multiplied by, if it hasn't unscaled the gradients yet; None for none.
        """
        for path, block in model.named_modules():
            if not isinstance(block, RepBlock):
                continue
            for name, weights in _weights(block).items():
                found = [weight.grad for weight in weights if weight.grad is not None]
                if not found:
                    continue
                size = sum(gradient.numel() for gradient in found)
                mean = torch.stack([gradient.abs().sum(dtype=torch.float32) for gradient in found]).sum() / size
                if scaler is not None:
                    mean = mean / scaler.get_scale()
                key = (path, name)
                self._sums[key] = self._sums.get(key, torch.zeros_like(mean)) + mean
                self._steps[key] = self._steps.get(key, 0) + 1

    def means(self) -> dict[str, dict[str, float]]:
        """Return the means so far, by site and path."""
        found: dict[str, dict[str, float]] = {}
        for (site, name), total in self._totals().items():
            found.setdefault(site, {})[name] = total / self._steps[site, name]
        return found

    def clear(self) -> None:
        """Begin a new epoch."""
        self._sums, self._steps = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on within an epoch."""
        return {"rows": [[*key, total, self._steps[key]] for key, total in self._totals().items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._sums = {(site, name): torch.tensor(total) for site, name, total, _ in state["rows"]}
        self._steps = {(site, name): steps for site, name, _, steps in state["rows"]}

    def _totals(self) -> dict[tuple[str, str], float]:
        if not self._sums:
            return {}
        return dict(zip(self._sums, torch.stack(list(self._sums.values())).tolist()))  # one transfer from the device


def _weights(block: RepBlock) -> dict[str, list[nn.Parameter]]:
    """Return the trainable weights of each path of a block."""
    found = {ORIGIN: [block.conv.weight], **{name: list(path.parameters()) for name, path in block.branches.items()}}
    return {name: [each for each in own if each.ndim > 1 and each.requires_grad] for name, own in found.items()}

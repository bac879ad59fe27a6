"""The processes of `torch.distributed` that train one model: whether there are several, and how they keep the same numbers."""

from __future__ import annotations

import torch
from torch import nn


def is_distributed() -> bool:
    """Whether this process belongs to a group of `torch.distributed`."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@torch.no_grad()
def take_from_first_rank(*modules: nn.Module) -> None:
    """Give modules on every rank the parameters and buffers that they have on the first."""
    if not is_distributed():
        return
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            torch.distributed.broadcast(tensor, 0)

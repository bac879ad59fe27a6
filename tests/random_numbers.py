"""Random numbers for tests."""

from __future__ import annotations

import torch


def numbers_from(seed: int) -> torch.Generator:
    """A seeded generator on the device that tests run on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)

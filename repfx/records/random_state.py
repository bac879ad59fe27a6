"""The state of Python's, torch's and numpy's random numbers, as plain values and tensors."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def read_random_state() -> dict[str, Any]:
    """Return the state of this process's random numbers, those of numpy only if it is imported."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    state = {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (kind, keys.tolist(), *rest)
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the random numbers of this process to a state that `read_random_state` returned."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    if "numpy" in state:
        importlib.import_module("numpy").random.set_state(state["numpy"])

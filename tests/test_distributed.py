"""Two processes with different data and different random numbers take the same decisions and keep the same weights."""

from __future__ import annotations

import pytest
import torch

from tests.two_ranks import run_on_two_ranks


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize(
    "schedule", ["dyrep", *(pytest.param(name, marks=pytest.mark.slow) for name in ("repan", "repnas", "des"))]
)
def test_both_ranks_end_with_the_same_model(schedule: str) -> None:
    assert "expand" in run_on_two_ranks("on_two_ranks", schedule)

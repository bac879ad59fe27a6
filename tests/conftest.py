"""Rules for every test, stricter than for a user's program: fixed seeds, one thread, no global state left changed."""

from __future__ import annotations

import gc
import math
import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

SLOW_START = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile("dev", max_examples=25, deadline=None, suppress_health_check=SLOW_START)
settings.register_profile("ci", settings.get_profile("dev"), max_examples=20, derandomize=True, print_blob=True)
settings.register_profile(
    "short", settings.get_profile("ci"), max_examples=8
)  # for tests that run with more examples elsewhere
settings.register_profile("fuzz", settings.get_profile("dev"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# Nets in tests are small: a second thread costs more than it gains, and one thread always sums in one order. Child processes, too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Tests run on the CPU even if there is a GPU. With TEST_DEVICE=cuda, tensors that are made without a device are on the GPU.
if "TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["TEST_DEVICE"])
    torch.use_deterministic_algorithms(True, warn_only=True)  # for tests that compare bits
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Thin out cases that are many and alike: `one_in(n)` makes the others slow, `slow_one_in(n)` makes other slow cases exhaustive."""
    _thin_out(items, "one_in", pytest.mark.slow, slow=False)
    _thin_out(items, "slow_one_in", pytest.mark.exhaustive, slow=True)


def _thin_out(items: list[pytest.Item], name: str, mark: pytest.MarkDecorator, *, slow: bool) -> None:
    """Mark the cases of each test, but for the first of each n, where n is the argument of the mark `name`."""
    seen: Counter[str] = Counter()
    for item in items:
        thinned = item.get_closest_marker(name)
        if thinned is not None and (item.get_closest_marker("slow") is not None) == slow:
            test = item.nodeid.partition("[")[0]
            if seen[test] % thinned.args[0]:
                item.add_marker(mark)
            seen[test] += 1


@pytest.fixture(autouse=True)
def untouched_global_state() -> Iterator[None]:
    """Seed torch, and fail a test that leaves torch changed: the default dtype, autograd, determinism, threads, autocast or a class."""
    torch.manual_seed(0)
    before = _global_state()
    yield
    assert _global_state() == before, (
        "global state of torch changed: (default dtype, autograd, determinism, threads, autocast, patches)"
    )


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let squeezed parts assemble their kernels together, as they do on every device but the CPU."""
    monkeypatch.setattr("repfx.blocks.together.ALONE", frozenset())


@pytest.fixture(autouse=True)
def memory_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Collect garbage before the next test needs the memory: torch.fx makes reference cycles that keep large models."""
    yield
    if request.node.get_closest_marker("slow") is not None:
        gc.collect()


def _global_state() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.is_autocast_enabled("cpu"),
        (nn.Module.__call__, nn.Module.__getattr__, torch.autocast.__enter__, math.sqrt),
    )

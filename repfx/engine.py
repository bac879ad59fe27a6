"""The processes, the device and the precision that a training runs on: an `Accelerator`, set up for a recipe and put away again."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from repfx.errors import InvalidInput, UnknownName, first_line
from repfx.recipe import Recipe


@contextmanager
def accelerator_for(recipe: Recipe, logs: Path | None = None, *, unused_parameters: bool = False) -> Iterator[Any]:
    """An `accelerate.Accelerator` as the recipe has it, in as many processes as torchrun or `accelerate launch` started.

    Args:
        logs: folder for the tracker's files.
        unused_parameters: whether some parameters have no part in some steps.

    Raises:
        InvalidInput: there is no such device, tracker or precision here, or Accelerate is missing.
    """
    accelerate = _package("accelerate")
    handler = accelerate.DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)
    automatic, cpu = recipe.device == "auto", recipe.device == "cpu"
    environment = {} if automatic or cpu else {"ACCELERATE_TORCH_DEVICE": recipe.device}
    _require_tracker(recipe.log_with)
    try:
        with patch.dict(os.environ, environment):
            accelerator = accelerate.Accelerator(
                cpu=cpu,
                mixed_precision=recipe.mixed_precision,
                log_with=recipe.log_with or None,
                project_dir=logs,
                kwargs_handlers=[handler],
            )
        nn.Linear(1, 1).to(accelerator.device)
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        _forget()
        raise InvalidInput(f"device {recipe.device!r} can't be used: {first_line(error)}.") from error
    try:
        with _algorithms(deterministic=recipe.deterministic):
            yield accelerator
    finally:
        accelerator.end_training()
        _forget()


@contextmanager
def _algorithms(*, deterministic: bool) -> Iterator[None]:
    """Deterministic ones, or the fastest."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if deterministic else {}
    torch.use_deterministic_algorithms(before[0] or deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        with patch.dict(os.environ, environment):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def _require_tracker(name: str) -> None:
    known = [str(each) for each in _package("accelerate.utils").LoggerType if str(each) != "all"]
    if name and name not in known:
        raise UnknownName("tracker", name, known)
    if name and importlib.util.find_spec(name) is None:
        raise InvalidInput(f"logging with {name} needs the package {name}: pip install {name}.")


def _forget() -> None:
    """Accelerate keeps one state for all its accelerators; the next one may need another."""
    _package("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)
    _package("accelerate.state").GradientState._reset_state()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InvalidInput("training needs accelerate, which is missing: pip install 'repfx[train]'.") from error

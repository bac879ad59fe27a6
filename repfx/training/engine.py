"""`accelerator_for`: sets up an `Accelerator` (processes, device and precision) for a recipe, and resets Accelerate afterwards."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repfx.change.ranks import is_distributed
from repfx.errors import InvalidInput, UnknownName, first_line
from repfx.training.recipe import Recipe

_DEVICE = "ACCELERATE_TORCH_DEVICE"
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_PLAIN = (
    "NO",
    "MULTI_CPU",
    "MULTI_GPU",
    "MULTI_XPU",
    "MULTI_NPU",
    "MULTI_HPU",
    "MULTI_MLU",
    "MULTI_MUSA",
    "MULTI_SDAA",
)


@contextmanager
def accelerator_for(recipe: Recipe, logs: Path | None = None) -> Iterator[Any]:
    """Set up an `accelerate.Accelerator` as the recipe asks, in as many processes as torchrun or `accelerate launch` started.

    Args:
        logs: folder for the tracker's files, if the tracker writes any.

    Raises:
        InvalidInput: the device, the tracker or the precision isn't available here, Accelerate is missing, this process has an accelerator
            or a process group already, or the launch isn't plain data parallelism.
    """
    accelerate = _package("accelerate")
    _require_tracker(recipe.log_with, logs)
    if _package("accelerate.state").PartialState._shared_state or is_distributed():
        raise InvalidInput(
            "this process has an accelerator or a process group already: pass the accelerator to `train` as `accelerator`."
        )
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    cpu = recipe.device == "cpu" or (recipe.device == "auto" and not torch.accelerator.is_available())
    chosen_by_rank = recipe.device in ("auto", "cpu") or (several and recipe.device == "cuda")
    try:
        with _environment({} if chosen_by_rank else {_DEVICE: recipe.device}):
            accelerator = accelerate.Accelerator(
                cpu=cpu,
                mixed_precision=recipe.mixed_precision,
                log_with=recipe.log_with or None,
                project_dir=logs,
                kwargs_handlers=[accelerate.DistributedDataParallelKwargs()],
            )
        nn.Linear(1, 1).to(accelerator.device)
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        _forget()
        raise InvalidInput(f"device {recipe.device!r} can't be used: {first_line(error)}.") from error
    try:
        _require_plain(accelerator, recipe)
        with _algorithms(deterministic=recipe.deterministic):
            yield accelerator
    finally:
        accelerator.end_training()
        _forget()


def _require_plain(accelerator: Any, recipe: Recipe) -> None:
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise InvalidInput(
            f"{started} processes were started, but device {recipe.device!r} runs in one: start without the launcher, or set device to cpu."
        )
    if accelerator.distributed_type.name not in _PLAIN:
        raise InvalidInput(
            f"{accelerator.distributed_type.name} keeps parts of the model in other processes, so its structure can't be changed: launch "
            "with plain data parallelism."
        )


@contextmanager
def _algorithms(*, deterministic: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms alone, or else let cuDNN choose the fastest by trial, inside the context."""
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(strict or deterministic, warn_only=warns and not deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        with _environment({_WORKSPACE: ":4096:8"} if deterministic else {}):
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _require_tracker(name: str, logs: Path | None) -> None:
    known = [str(each) for each in _package("accelerate.utils").LoggerType if str(each) != "all"]
    if name and name not in known:
        raise UnknownName("tracker", name, known)
    if name and importlib.util.find_spec(name) is None:
        raise InvalidInput(f"logging with {name} needs the package {name}: pip install {name}.")
    if name == "tensorboard" and logs is None:
        raise InvalidInput(
            "tensorboard writes files, and there is no folder for them: give `accelerator_for` a folder as `logs`."
        )


def _forget() -> None:
    """Reset the state that all accelerators of a process share, because the next one may need another."""
    _package("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)
    _package("accelerate.state").GradientState._reset_state()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InvalidInput("training needs accelerate, which is missing: pip install 'repfx[train]'.") from error

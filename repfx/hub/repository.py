"""`push` and `load`: a training run as a repository of the Hugging Face Hub, through `huggingface_hub`."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from repfx.data.load import prefix_of
from repfx.errors import InvalidInput, first_line
from repfx.hub.model_card import model_card
from repfx.training.recipe_file import to_toml
from repfx.training.run_folder import (
    ARCHITECTURE,
    CHECKPOINT,
    EVALUATION,
    HISTORY,
    INT8,
    METRICS,
    MODEL,
    RECIPE,
    STRUCTURE,
    RunFolder,
)
from repfx.training.trust import Trust

CARD = "README.md"
_COPIED = (MODEL, INT8, CHECKPOINT, METRICS, EVALUATION, HISTORY, ARCHITECTURE)
_NEEDED = (CHECKPOINT, STRUCTURE)  # to build the model again


def push(
    run: str | os.PathLike[str],
    repository: str,
    *,
    license: str | None = None,
    private: bool = False,
    token: str | None = None,
    message: str = "A run of repfx",
    endpoint: str | None = None,
) -> str:
    """Push a finished training run to the Hub, with a card that is written from its numbers. The run's folder isn't changed.

    Args:
        run: the folder of the run.
        repository: name of the repository, such as ``me/repvgg-digits``. It is made if it doesn't exist.
        license: license of the weights, as the Hub names it, such as ``mit``.
        private: whether a new repository is private.
        token: token for the Hub; None takes that of ``hf auth login``.
        message: message of the commit.
        endpoint: address of the Hub; None takes the public one, or ``HF_ENDPOINT``.

    Returns:
        The address of the commit.

    Raises:
        InvalidInput: the folder holds no finished run, the Hub refuses, or huggingface_hub is missing (``pip install 'repfx[hub]'``).
    """
    folder = RunFolder(Path(run))
    if not (folder.path / STRUCTURE).is_file():
        raise InvalidInput(f"folder {str(folder.path)!r} holds no training run: it has no {STRUCTURE}.")
    card = model_card(folder, repository=repository, license=license)
    hub = _hub()
    with TemporaryDirectory() as name:
        for file in _COPIED:
            if (folder.path / file).is_file():
                shutil.copyfile(folder.path / file, Path(name) / file)
        for file, text in {**_without_folders(folder), CARD: card}.items():
            (Path(name) / file).write_text(text, encoding="utf-8")
        api = hub.HfApi(endpoint=endpoint, token=token, library_name="repfx")
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=repository, folder_path=name, commit_message=message)
        except Exception as error:  # of huggingface_hub and of the library by which it speaks HTTP
            raise InvalidInput(f"the Hub doesn't take {repository!r}: {first_line(error)}") from error
    return str(done.commit_url)


def load(
    repository: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    trust: Trust = False,
    endpoint: str | None = None,
) -> nn.Module:
    """Return the model of a run on the Hub, or in a folder, in its training form and in eval mode.

    No code is run from the Hub. A run may name code, as its model; without `trust`, only models of torchvision, timm and
    `repfx.recipes.nets` are built.

    Args:
        repository: name of the repository, or a folder.
        revision: branch, tag or commit; None takes the newest commit.
        token: token for the Hub; None takes that of ``hf auth login``.
        trust: as in `RunFolder.load`.
        endpoint: address of the Hub; None takes the public one, or ``HF_ENDPOINT``.

    Raises:
        InvalidInput: there is no such run, it doesn't fit together or isn't trusted, or huggingface_hub is missing.
    """
    if Path(repository).is_dir():
        return RunFolder(Path(repository)).load(trust=trust)
    try:
        path = _hub().snapshot_download(
            str(repository), revision=revision, token=token, endpoint=endpoint, allow_patterns=list(_NEEDED)
        )
    except InvalidInput:
        raise
    except Exception as error:  # of huggingface_hub and of the library by which it speaks HTTP
        raise InvalidInput(f"{str(repository)!r} can't be loaded from the Hub: {first_line(error)}") from error
    missing = [name for name in _NEEDED if not (Path(path) / name).is_file()]
    if missing:
        raise InvalidInput(f"{str(repository)!r} holds no run of repfx: it has no {' and no '.join(missing)}.")
    return RunFolder(Path(path)).load(trust=trust)


def _without_folders(folder: RunFolder) -> dict[str, str]:
    """Return the setup and the recipe of a run as texts that name no folder of this machine."""
    setup = folder.setup
    model = replace(setup.model, name=setup.model.short_name)
    found = {STRUCTURE: replace(setup, model=model).to_json() + "\n"}
    recipe = folder.recipe
    if recipe is not None:
        found[RECIPE] = to_toml(_short(recipe))
    return found


def _short(value: Any) -> Any:
    """Return values of a recipe with the last part of each text that is an absolute path."""
    if isinstance(value, Mapping):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_short(part) for part in value]
    if not isinstance(value, str):
        return value
    begin = prefix_of(value)
    path = value.removeprefix(begin)
    absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    return f"{begin}{PureWindowsPath(path).name}" if absolute else value


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise InvalidInput("the Hub needs huggingface_hub, which is missing: pip install 'repfx[hub]'.") from error

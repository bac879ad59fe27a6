"""Where an ONNX file goes: found out before any slow work, and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from repfx.errors import ExportError, InvalidInput


@contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[tuple[Path, Path]]:
    """The file's final path, and a path of the same name in a new folder beside it in which to build the file.

    What stands in the folder when the block ends moves to the final path's folder; an error throws it away.

    Raises:
        InvalidInput: the path can't be written.
        ExportError: the finished file can't be moved there.
    """
    target = _target(path)
    try:
        folder = TemporaryDirectory(prefix=f".{target.name[:100]}.", dir=target.parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise InvalidInput(f"can't write into folder {str(target.parent)!r}: {error.strerror}.") from error
    with folder as name:
        staging = Path(name) / target.name
        yield target, staging
        # The model last: whoever sees it sees the weights beside it too.
        for file in sorted(staging.parent.iterdir(), key=staging.__eq__):
            _move(file, target.parent / file.name)


def _target(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidInput(f"path is of type {type(path).__name__}: give the name of a file, as 'model.onnx'.")
    try:
        target = Path(path).resolve()
        if target.is_dir():
            raise InvalidInput(f"{str(path)!r} is a folder: give a file in it, as {str(target / 'model.onnx')!r}.")
        if target.suffix != ".onnx":
            raise InvalidInput(f"{str(path)!r} doesn't end in '.onnx', by which other tools know the format.")
        if not target.parent.is_dir():
            raise InvalidInput(f"can't write {str(path)!r}: there is no folder {str(target.parent)!r}.")
        if target.exists() and not (target.is_file() and os.access(target, os.W_OK)):
            raise InvalidInput(f"can't write {str(path)!r}: it exists and is read-only or no ordinary file.")
    except (OSError, RuntimeError, ValueError) as error:
        raise InvalidInput(f"can't write {str(path)!r}: {error}.") from error
    return target


def _move(file: Path, target: Path) -> None:
    try:
        file.replace(target)
    except OSError as error:
        raise ExportError(f"can't write {str(target)!r}: {error.strerror}.") from error

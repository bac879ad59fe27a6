"""Files whose path is checked before any slow work, and which are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from repfx.errors import InvalidInput


@contextmanager
def staged(path: str | os.PathLike[str], suffix: str = "") -> Iterator[tuple[Path, Path]]:
    """Yield the file's final path, and a path of the same name in a new folder beside it, in which to build the file.

    When the block ends, all files in the new folder move to the final path's folder. After an error they are deleted.

    Args:
        suffix: ending that the file's name must have, such as ``.onnx``.

    Raises:
        InvalidInput: the path can't be written, or the finished file can't be moved there.
    """
    target = _target(path, suffix)
    try:
        folder = TemporaryDirectory(prefix=f".{target.name[:100]}.", dir=target.parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise InvalidInput(f"can't write into folder {str(target.parent)!r}: {error.strerror}.") from error
    with folder as name:
        staging = Path(name) / target.name
        yield target, staging
        # The model moves last, so that whoever sees it sees the weights beside it too.
        for file in sorted(staging.parent.iterdir(), key=staging.__eq__):
            _move(file, target.parent / file.name)


def _target(path: str | os.PathLike[str], suffix: str) -> Path:
    example = f"model{suffix}"
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidInput(f"path is of type {type(path).__name__}: give the name of a file, such as {example!r}.")
    try:
        target = Path(path).resolve()
        if target.is_dir():
            raise InvalidInput(f"{str(path)!r} is a folder: give a file in it, such as {str(target / example)!r}.")
        if suffix and target.suffix != suffix:
            raise InvalidInput(f"{str(path)!r} doesn't end in {suffix!r}, by which other tools know the format.")
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
        raise InvalidInput(f"can't write {str(target)!r}: {error.strerror}.") from error

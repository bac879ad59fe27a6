"""Files whose path is checked before any slow work, and which are written whole or not at all.

A file is built in a folder of its own beside its final path, and it is synced to disk before it takes its name. A process that is killed
leaves that folder behind. Whoever writes the file next removes the folder, unless a file is still being built in it.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from repfx.errors import InvalidInput, first_line

_ENDING = ".unfinished"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_CHUNK = 1 << 20
_TOLD = re.compile(r"\(os error (\d+)\)")  # Rust's form of an error of the system


@contextmanager
def staged(path: str | os.PathLike[str], suffix: str = "") -> Iterator[tuple[Path, Path]]:
    """Yield the file's final path, and a path of the same name in a new folder beside it, in which to build the file.

    When the block ends, all files in the new folder are synced to disk and move to the final path's folder. After an error they are
    deleted.

    Args:
        suffix: ending that the file's name must have, such as ``.onnx``.

    Raises:
        InvalidInput: the path can't be written, the disk is full, or the finished file can't be moved there.
    """
    target = _target(path, suffix)
    remove_leftovers(target)
    try:
        folder = tempfile.TemporaryDirectory(
            prefix=_beginning(target), suffix=_ENDING, dir=target.parent, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise InvalidInput(f"can't write into folder {str(target.parent)!r}: {error.strerror}.") from error
    with folder as name, _locked(Path(name)):
        staging = Path(name) / target.name
        try:
            yield target, staging
        except Exception as error:
            reason = reason_of_failed_write(error, staging.parent)
            if reason is None:
                raise
            raise InvalidInput(f"can't write {str(target)!r}: {reason}.") from error
        try:
            _finish(staging, target.parent)
        except OSError as error:
            raise InvalidInput(f"can't write {str(target)!r}: {error.strerror}.") from error


def require_room(folder: Path, size: int) -> None:
    """Raise `OSError` if no file of a size can be written into a folder. Some libraries write half a file and don't notice."""
    with tempfile.TemporaryFile(dir=folder) as file:
        for begin in range(0, size, _CHUNK):
            file.write(bytes(min(_CHUNK, size - begin)))
        file.flush()


def _finish(staging: Path, folder: Path) -> None:
    """Give all built files the permissions that the umask asks for, sync them, and move them to their folder."""
    files = sorted(staging.parent.iterdir(), key=staging.__eq__)  # the model last: who sees it sees its weights, too
    mode = _mode_of_new_file(staging.parent)
    for file in files:
        file.chmod(mode)
        with file.open("rb+" if os.name == "nt" else "rb") as opened:
            os.fsync(opened.fileno())
    for file in files:
        file.replace(folder / file.name)
    _sync_folder(folder)


def _mode_of_new_file(folder: Path) -> int:
    """Return the permissions of a new file. A library that makes its own temporary file gives it others."""
    new = folder / ".new"
    new.touch()
    mode = new.stat().st_mode & 0o777
    new.unlink()
    return mode


def reason_of_failed_write(error: BaseException, folder: Path) -> str | None:
    """Return why the system refused to write into `folder`, if that is what an error or its cause says; otherwise None."""
    link: BaseException | None = error
    while link is not None:
        told = _TOLD.search(str(link))
        number = link.errno if isinstance(link, OSError) else int(told[1]) if told else None
        inside = isinstance(link, OSError) and str(link.filename or "").startswith(str(folder))
        if number is not None and (inside or number in _NO_ROOM):
            return os.strerror(number)
        link = link.__cause__
    return None


def remove_leftovers(target: Path) -> None:
    """Remove the folders in which processes that were killed have built the file at `target`."""
    known = re.compile(rf"{re.escape(_beginning(target))}\w{{8}}{re.escape(_ENDING)}")
    with suppress(OSError):
        for folder in target.parent.iterdir():
            if known.fullmatch(folder.name) and folder.is_dir() and not is_locked(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _beginning(target: Path) -> str:
    return f".{target.name[:100]}."


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, which the system releases if this process is killed."""
    lock = _lock(folder)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def is_locked(folder: Path) -> bool:
    """Whether a file is being built in the folder now. Where the system has no locks, it refuses to remove files in use."""
    if importlib.util.find_spec("fcntl") is None:
        return False
    lock = _lock(folder)
    if lock is None:
        return True
    os.close(lock)
    return False


def _lock(folder: Path) -> int | None:
    """Lock a folder; return the open file that holds the lock, or None if it can't be had."""
    if importlib.util.find_spec("fcntl") is None:  # Windows
        return None
    fcntl = importlib.import_module("fcntl")
    found = None
    try:
        found = os.open(folder, os.O_RDONLY)
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if found is not None:
            os.close(found)
        return None
    return found


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
        raise InvalidInput(f"can't write {str(path)!r}: {first_line(error)}.") from error
    return target


def _sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on disk, where the system can do that."""
    with suppress(OSError):  # Windows opens no folders, and some network drives can't sync them
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)

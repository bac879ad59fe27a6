"""Read an image file as it is meant to be seen, and tell which files can't be read, without ending a training for one of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset, Subset

from repfx.errors import InvalidInput, first_line
from repfx.records.number_text import plural

_GREY = ("1", "L", "LA", "La")
_SHORT = 257  # from 16 bits to 8
_NAMED = 5
_SMALL = (1, 1)  # a draft of this size reads a whole JPEG file, and computes an eighth of its height and width


def read_image(path: str | Path) -> Any:
    """Return the image in a file as a PIL image of mode L or RGB, turned as its EXIF orientation says.

    16 bits become 8. Transparency is left out.

    Raises:
        InvalidInput: the range of the pixels isn't known, because they are floats or have 32 bits.
        Exception: whatever PIL raises for a file that is missing, broken or too large.
    """
    return _read(path)


def _read(path: str | Path, *, draft: bool = False) -> Any:
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        if draft:
            image.draft(None, _SMALL)
        image.load()
        return _in_bytes(ImageOps.exif_transpose(image), of_16_bits=image.mode == "I" and image.format == "PNG")


def _in_bytes(image: Any, *, of_16_bits: bool) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16") or of_16_bits:
        return Image.fromarray(((numpy.asarray(image).astype(numpy.int64) + _SHORT // 2) // _SHORT).astype(numpy.uint8))
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "whole numbers of 32 bits"
        raise InvalidInput(f"its pixels are {kind}, whose range isn't known: save it with 8 or 16 bits.")
    if image.mode == "P":
        image = image.convert("RGBA")  # PIL warns if it is to leave out a palette's transparency by itself
    return image.convert("L" if image.mode in _GREY else "RGB")


class ImageFiles(Dataset[Any]):
    """Image files with labels. In place of a file that can't be read, the next one of its class is returned.

    Args:
        samples: path and label of each file.
    """

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        self.paths = [path for path, _ in samples]
        self.targets = [label for _, label in samples]
        self._unread = torch.zeros(len(samples), dtype=torch.bool).share_memory_()  # by processes that load images, too

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for place in self._in_turn(index):
            if self._unread[place]:
                continue
            try:
                return read_image(self.paths[place]), self.targets[place]
            except Exception:  # whatever a broken file can fail with
                self._unread[place] = True
        raise InvalidInput(f"no other image can be read of the class of {self.paths[index]!r}, nor can this one.")

    def _in_turn(self, index: int) -> Iterator[int]:
        yield index
        alike = self._alike[self.targets[index]]
        at = alike.index(index)
        yield from alike[at + 1 :] + alike[:at]

    @cached_property
    def _alike(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for place, label in enumerate(self.targets):
            found.setdefault(label, []).append(place)
        return found

    @property
    def unreadable(self) -> list[str]:
        """The paths of the files that were to be read so far and couldn't be."""
        return [self.paths[place] for place in self._unread.nonzero().flatten().tolist()]

    def check(self) -> dict[str, str]:
        """Read all files, and return the reason for each that can't be read, by path."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # PIL lets other threads run while it decodes
            reasons = list(threads.map(_reason, self.paths))
        for place, reason in enumerate(reasons):
            self._unread[place] = reason is not None
        return {path: reason for path, reason in zip(self.paths, reasons) if reason is not None}

    def without_unreadable(self) -> ImageFiles:
        """Return the other files."""
        return ImageFiles(
            [(p, y) for p, y, unread in zip(self.paths, self.targets, self._unread.tolist()) if not unread]
        )


def reasons_for(paths: Sequence[str]) -> dict[str, str]:
    """Return the reason why each of some files can't be read, by path."""
    return {path: _reason(path) or "it couldn't be read then, and can be now" for path in paths}


def _reason(path: str) -> str | None:
    try:
        _read(path, draft=True)
    except Exception as error:
        return str(getattr(error, "strerror", None) or first_line(error).replace(repr(path), "it"))
    return None


def told(reasons: Mapping[str, str], what: str, *, strict: bool = False) -> str:
    """Return a sentence on files that can't be read, which names the first few. Unless `strict`, it says that they are left out.

    >>> told({"a.png": "image file is truncated"}, "training image")
    "1 training image can't be read and is left out: 'a.png' (image file is truncated)"
    """
    count = len(reasons)
    named = [f"{path!r} ({reason})" for path, reason in list(reasons.items())[:_NAMED]]
    more = [f"… ({count} in all)"] if count > _NAMED else []
    left = "" if strict else f" and {'is' if count == 1 else 'are'} left out"
    return f"{plural(count, what)} can't be read{left}: {', '.join([*named, *more])}"


def files_in(images: Any) -> ImageFiles | None:
    """Return the files that images come from; None if they come from none."""
    while not isinstance(images, ImageFiles):
        images = images.dataset if isinstance(images, Subset) else getattr(images, "raw", None)
        if images is None:
            return None
    return images


def require_whole(folder: Path) -> None:
    """Raise if a symbolic link in a folder leads nowhere, or back to a folder that holds it, so that files would count many times.

    Raises:
        InvalidInput: there is such a link; the message names it.
    """
    for inside, names, _ in os.walk(folder, followlinks=True):
        for link in filter(Path.is_symlink, (Path(inside, name) for name in names)):
            above = [each for each in link.parents if each == folder or folder in each.parents]
            if link.resolve() in map(Path.resolve, above):
                raise InvalidInput(
                    f"{str(link)!r} leads back to {str(link.resolve())!r}, which holds it: remove this link."
                )
    for link in folder.iterdir():
        if link.is_symlink() and not link.exists():
            raise InvalidInput(f"{str(link)!r} is a link that leads nowhere: remove it, or put back what it leads to.")

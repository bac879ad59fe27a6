"""Read images as they are meant to be seen, and tell which can't be read, without ending a training for one of them."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from torch.utils.data import Dataset, Subset

from repfx.errors import InvalidInput, first_line
from repfx.records.number_text import plural

_GREY = ("1", "L", "LA", "La")
_SHORT = 257  # from 16 bits to 8
_NAMED = 5
_IN_MEMORY = re.compile("<_io.BytesIO object at 0x[0-9a-f]+>")  # as PIL names what is no file
_SMALL = (1, 1)  # a draft of this size reads a whole JPEG file, and computes an eighth of its height and width


def read_image(path: str | Path | IO[bytes]) -> Any:
    """Return the image in a file as a PIL image of mode L or RGB, turned as its EXIF orientation says.

    16 bits become 8. Transparency is left out.

    Raises:
        InvalidInput: the range of the pixels isn't known, because they are floats or have 32 bits.
        Exception: whatever PIL raises for a file that is missing, broken or too large.
    """
    return _read(path)


def _read(path: str | Path | IO[bytes], *, draft: bool = False) -> Any:
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


class EncodedImages(Dataset[Any], ABC):
    """Encoded images with labels. In place of an image that can't be read, the next one of its class is returned.

    Args:
        paths: name of each image, by which messages tell where it lies.
        targets: label of each image.
    """

    def __init__(self, paths: Sequence[str], targets: Sequence[int]) -> None:
        self.paths = list(paths)
        self.targets = list(targets)
        self._unread = torch.zeros(len(paths), dtype=torch.bool).share_memory_()  # by processes that load images, too

    @abstractmethod
    def encoded(self, place: int) -> str | Path | IO[bytes]:
        """Return the file of an image, or its bytes to be read."""

    @abstractmethod
    def part(self, places: Sequence[int]) -> EncodedImages:
        """Return some of the images."""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for place in self._in_turn(index):
            if self._unread[place]:
                continue
            try:
                return _read(self.encoded(place)), self.targets[place]
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
        """The names of the images that were to be read so far and couldn't be."""
        return [self.paths[place] for place in self._unread.nonzero().flatten().tolist()]

    def check(self) -> dict[str, str]:
        """Read all images, and return the reason for each that can't be read, by name."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # PIL lets other threads run while it decodes
            reasons = list(threads.map(self._reason, range(len(self))))
        for place, reason in enumerate(reasons):
            self._unread[place] = reason is not None
        return {path: reason for path, reason in zip(self.paths, reasons) if reason is not None}

    def without_unreadable(self) -> EncodedImages:
        """Return the other images."""
        return self.part((~self._unread).nonzero().flatten().tolist())

    def reasons_for(self, paths: Sequence[str]) -> dict[str, str]:
        """Return the reason why each of some images can't be read, by name."""
        places = {path: place for place, path in enumerate(self.paths)} if paths else {}
        return {path: self._reason(places[path]) or "it couldn't be read then, and can be now" for path in paths}

    def _reason(self, place: int) -> str | None:
        try:
            _read(self.encoded(place), draft=True)
        except Exception as error:
            told = _IN_MEMORY.sub("it", first_line(error)).replace(repr(self.paths[place]), "it")
            return str(getattr(error, "strerror", None) or told)
        return None


class ImageFiles(EncodedImages):
    """Image files with labels.

    Args:
        samples: path and label of each file.
    """

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        super().__init__([path for path, _ in samples], [label for _, label in samples])

    def encoded(self, place: int) -> str:
        """Return the path of a file."""
        return self.paths[place]

    def part(self, places: Sequence[int]) -> ImageFiles:
        """Return some of the files."""
        return ImageFiles([(self.paths[place], self.targets[place]) for place in places])


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


def encoded_in(images: Any) -> EncodedImages | None:
    """Return the encoded images that images are read from; None if they come from none."""
    while not isinstance(images, EncodedImages):
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

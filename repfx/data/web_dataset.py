"""Data sets of images in WebDataset's shards: tar files that hold each image beside a file with its class, under one name.

The shards are indexed by the heads of what they hold, and each image is read from its place. So an epoch has any order, as it has with a
folder of images, and an interrupted training goes on with the same images. WebDataset itself reads shards from the beginning to the end.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from repfx.data.dataset import MOST_CLASSES, DataSet, DataSource, InputForm, every_fifth
from repfx.data.image_files import SIZE, TEST_FOLDERS, of_encoded, usual
from repfx.data.reading import EncodedImages
from repfx.errors import InvalidInput, first_line
from repfx.onnx.preprocessing import Preprocessing
from repfx.records.plain_values import from_plain

_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff")


@dataclass(frozen=True)
class Options:
    """Options of a folder of shards, in `data.options`.

    Args:
        train: pattern of the training shards' names; empty for ``train*.tar``, or for all shards if there are none of these.
        test: pattern of the test shards' names; empty for ``test*.tar``, ``val*.tar`` and the like. Without any, every fifth image of each
            class of the training shards is a test image.
        label: ending of the files that hold the classes, as numbers from 0 or as names of `classes`.
        classes: file in the folder that names the classes, one in each line. Without it, classes are called by their numbers.
    """

    train: str = ""
    test: str = ""
    label: str = "cls"
    classes: str = "classes.txt"


@dataclass(frozen=True)
class Member:
    """The place of an image in a shard, in bytes."""

    shard: str
    offset: int
    size: int


class ShardImages(EncodedImages):
    """The images in shards. Each is called by its shard and its name in it.

    Args:
        members: their places.
    """

    def __init__(self, paths: Sequence[str], targets: Sequence[int], members: Sequence[Member]) -> None:
        super().__init__(paths, targets)
        self.members = list(members)

    def encoded(self, place: int) -> IO[bytes]:
        """Return the bytes of an image."""
        member = self.members[place]
        with Path(member.shard).open("rb") as shard:
            shard.seek(member.offset)
            return io.BytesIO(shard.read(member.size))

    def part(self, places: Sequence[int]) -> ShardImages:
        """Return some of the images."""
        return ShardImages(
            [self.paths[place] for place in places],
            [self.targets[place] for place in places],
            [self.members[place] for place in places],
        )


def load(source: DataSource, form: InputForm, preprocessing: Preprocessing | None = None) -> DataSet:
    """Load the images in a folder of shards.

    Raises:
        InvalidInput: there is no such folder, its shards can't be read, or an image has no class.
        OSError: a file can't be read.
    """
    options = from_plain(Options, dict(source.options), "data.options")
    folder = Path(source.name)
    if not folder.is_dir():
        raise InvalidInput(
            f"{source.name!r} is no folder: shards are read from a folder of this machine; options choose among them."
        )
    tests = _shards(folder, [options.test] if options.test else [f"{name}*.tar" for name in TEST_FOLDERS])
    shards = _shards(folder, [options.train] if options.train else ["train*.tar", "*.tar"])
    if not shards or (options.test and not tests):
        wanted = (options.test if shards else options.train) or "*.tar"
        raise InvalidInput(f"{source.name!r} holds no shard {wanted!r}: shards are tar files.")
    classes = _classes(folder / options.classes, needed=options.classes != Options.classes)
    train = _images([shard for shard in shards if shard not in tests], options.label, classes)
    if not tests:
        chosen = every_fifth(torch.tensor(train.targets))
        train, test = (train.part(mask.nonzero().flatten().tolist()) for mask in (~chosen, chosen))
    else:
        test = _images(tests, options.label, classes)
    if not len(train) or not len(test):
        raise InvalidInput(
            f"{source.name!r} has {len(train)} images to train on and {len(test)} to test on: both need some."
        )
    names = classes or tuple(map(str, range(1 + max(train.targets + test.targets))))
    if len(names) < 2:
        raise InvalidInput(f"{source.name!r} has one class alone, {names[0]!r}: a classifier needs at least two.")
    return of_encoded(source, train, test, names, preprocessing or usual(form, form.size or SIZE, source.crop))


def _shards(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files of the first pattern that some have."""
    return next((found for pattern in patterns if (found := sorted(folder.glob(pattern)))), [])


def _classes(path: Path, *, needed: bool) -> tuple[str, ...]:
    if not needed and not path.is_file():
        return ()
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if len(set(names)) != len(names) or not names:
        raise InvalidInput(f"{str(path)!r} must name each class in a line of its own, and no class twice.")
    return names


def _images(shards: Sequence[Path], label: str, classes: Sequence[str]) -> ShardImages:
    paths, targets, members = [], [], []
    places = {name: place for place, name in enumerate(classes)}
    for shard in shards:
        for name, text, member in _samples(shard, label):
            where = f"{shard}/{name}"
            paths.append(where)
            targets.append(_target(text, where, places))
            members.append(member)
    return ShardImages(paths, targets, members)


def _samples(shard: Path, label: str) -> Iterator[tuple[str, str, Member]]:
    """Yield the name, the class and the place of each image of a shard."""
    images: dict[str, tuple[str, Member]] = {}
    texts: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for each in archive:
                folder, _, file = each.name.rpartition("/")
                key, _, ending = file.partition(".")
                key, ending = f"{folder}/{key}", ending.lower()
                if not each.isfile() or not key:
                    continue
                if ending == label.lower():
                    held = archive.extractfile(each)
                    texts[key] = "" if held is None else held.read().decode("utf-8", "replace").strip()
                elif ending in _IMAGES:
                    if key in images:
                        raise InvalidInput(
                            f"{str(shard)!r} has two images {key.lstrip('/')!r}: each needs a name of its own."
                        )
                    images[key] = each.name, Member(str(shard), each.offset_data, each.size)
    except tarfile.TarError as error:
        raise InvalidInput(f"{str(shard)!r} is no tar file without compression: {first_line(error)}.") from error
    if not images:
        raise InvalidInput(f"{str(shard)!r} holds no images; their names end in {', '.join(_IMAGES)}.")
    for key, (name, member) in images.items():
        if key not in texts:
            raise InvalidInput(
                f"{str(shard)!r} has no class for {name!r}: beside it, a file that ends in .{label} must hold it."
            )
        yield name, texts[key], member


def _target(text: str, where: str, places: dict[str, int]) -> int:
    """Return the number of a class that is given by its name or its number."""
    if text in places:
        return places[text]
    limit = len(places) or MOST_CLASSES
    if not text.isdecimal() or int(text) >= limit:
        named = f"one of the {limit} names, or " if places else ""
        advice = "" if places else ", or classes.txt must name it"
        raise InvalidInput(
            f"the class of {where!r} is {text[:40]!r}; it must be {named}a number below {limit}{advice}."
        )
    return int(text)

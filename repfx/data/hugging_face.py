"""Data sets of images for Hugging Face's `datasets`: of their Hub by name, saved on disk, or a folder of images or Parquet files.

`datasets` 4 and later run no code that comes with a data set, so a recipe may name any.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from repfx.data.dataset import DataSet, DataSource, InputForm, every_fifth
from repfx.data.image_files import SIZE, of_encoded, usual
from repfx.data.reading import EncodedImages, read_image
from repfx.errors import InvalidInput, first_line
from repfx.onnx.preprocessing import Preprocessing
from repfx.records.plain_values import from_plain

_TESTS = ("test", "validation", "valid", "val")
_SEEN = 8  # images whose sizes decide whether the data has a size of its own


@dataclass(frozen=True)
class Options:
    """Options of a data set for `datasets`, in `data.options`.

    Args:
        config: name of the data set's configuration, if it has several.
        revision: branch, tag or commit of a data set of the Hub.
        image: name of the column of images; empty for the only one.
        label: name of the column of class labels; empty for the only one.
        train: name of the training part.
        test: name of the test part; empty for the first of test, validation, valid and val whose images have labels. Without any, it is
            every fifth image of each class of the training part.
    """

    config: str = ""
    revision: str = ""
    image: str = ""
    label: str = ""
    train: str = "train"
    test: str = ""


class Rows(EncodedImages):
    """The images in rows of a `datasets.Dataset`. A row is called by the name of its part and its number, such as ``train[3]``.

    Args:
        table: data set with a column of images that aren't decoded.
        column: name of this column.
        rows: numbers of the rows.
        targets: their labels.
    """

    def __init__(self, table: Any, column: str, part: str, rows: Sequence[int], targets: Sequence[int]) -> None:
        super().__init__([f"{part}[{row}]" for row in rows], targets)
        self.table, self.column, self.name, self.rows = table, column, part, list(rows)

    def encoded(self, place: int) -> str | IO[bytes]:
        """Return the bytes of an image, or the path of its file if the data set holds only this."""
        found = self.table[self.rows[place]][self.column]
        if not found or (found.get("bytes") is None and not found.get("path")):
            raise InvalidInput("there is no image")
        return found["path"] if found.get("bytes") is None else io.BytesIO(found["bytes"])

    def part(self, places: Sequence[int]) -> Rows:
        """Return some of the images."""
        rows, targets = ([each[place] for place in places] for each in (self.rows, self.targets))
        return Rows(self.table, self.column, self.name, rows, targets)


def load(source: DataSource, form: InputForm, preprocessing: Preprocessing | None = None) -> DataSet:
    """Load a data set with a column of images and a column of class labels.

    Args:
        source: its name is that of a data set of the Hub, or a folder. Data sets of the Hub must be in the cache of `datasets`, unless
            `source.download` lets them be downloaded.

    Raises:
        InvalidInput: `datasets` is missing, there is no such data set, or it isn't one of images of classes.
    """
    options = from_plain(Options, dict(source.options), "data.options")
    parts = _parts(source, options)
    if options.train not in parts:
        raise InvalidInput(
            f"{source.name!r} has no part {options.train!r}; it has {', '.join(parts)}: set the option train."
        )
    table = parts[options.train]
    image = _column(table, source.name, "image", "Image", options.image)
    label = _column(table, source.name, "label", "ClassLabel", options.label)
    classes = tuple(map(str, table.features[label].names))
    if len(classes) < 2:
        raise InvalidInput(f"{source.name!r} has {len(classes)} classes: a classifier needs at least two.")
    train = _rows(table, source.name, image, label, options.train)
    if (tests := _test_part(parts, source.name, options, label)) is None:
        chosen = every_fifth(torch.tensor(train.targets))
        train, test = (train.part(mask.nonzero().flatten().tolist()) for mask in (~chosen, chosen))
    else:
        test = _rows(parts[tests], source.name, image, label, tests)
        if tuple(map(str, parts[tests].features[label].names)) != classes:
            raise InvalidInput(f"{source.name!r} has other classes in {tests!r} than in {options.train!r}.")
    if not len(train) or not len(test):
        raise InvalidInput(
            f"{source.name!r} has {len(train)} images to train on and {len(test)} to test on: both need some."
        )
    preprocessing = preprocessing or usual(form, form.size or _own_size(train), source.crop)
    return of_encoded(source, train, test, classes, preprocessing)


def _parts(source: DataSource, options: Options) -> Mapping[str, Any]:
    """Return the parts of a data set by name, as `datasets` loads them."""
    library = _library()
    path = Path(source.name)
    try:
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            found = library.load_from_disk(str(path))
        else:
            with _downloads(library, allowed=source.download or path.is_dir()):
                found = library.load_dataset(
                    str(path) if path.is_dir() else source.name,
                    options.config or None,
                    revision=options.revision or None,
                )
    except Exception as error:  # whatever files, caches and downloads can fail with
        advice = "" if path.is_dir() or source.download else "; --download lets it be fetched"
        raise InvalidInput(
            f"the data set {source.name!r} can't be loaded by datasets ({first_line(error)}){advice}."
        ) from error
    return found if isinstance(found, Mapping) else {options.train: found}


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise InvalidInput(
            "data sets named hf:… need datasets, which is missing: pip install 'repfx[datasets]'."
        ) from error


@contextmanager
def _downloads(library: Any, *, allowed: bool) -> Iterator[None]:
    """Let `datasets` look into its cache alone, inside the context, unless downloads are allowed."""
    before = library.config.HF_HUB_OFFLINE
    library.config.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        library.config.HF_HUB_OFFLINE = before


def _column(table: Any, name: str, option: str, kind: str, asked: str) -> str:
    """Return the name of the column of a kind: the one that an option asks for, or the only one."""
    kinds = {str(column): type(feature).__name__ for column, feature in table.features.items()}
    fitting = [column for column, found in kinds.items() if found == kind]
    if asked in fitting:
        return asked
    has = f"its columns are {', '.join(f'{column} ({found})' for column, found in kinds.items())}"
    if asked:
        found = f"is {kinds[asked]}, and not {kind}" if asked in kinds else "doesn't exist"
        raise InvalidInput(f"in {name!r}, the column {asked!r} {found}; {has}.")
    if len(fitting) != 1:
        advice = (
            f"name one by the option {option}" if fitting else f"cast one to datasets.{kind}, and save the data set"
        )
        raise InvalidInput(f"{name!r} has {len(fitting)} columns of {kind}; {has}: {advice}.")
    return fitting[0]


def _rows(table: Any, name: str, image: str, label: str, part: str) -> Rows:
    lacking = [each for each in (image, label) if each not in table.features]
    if lacking:
        raise InvalidInput(f"in {name!r}, {part!r} has no column {lacking[0]!r}.")
    targets = _labels(table, label)
    unlabelled = sum(each is None or each < 0 for each in targets)
    if unlabelled:
        raise InvalidInput(
            f"in {name!r}, {unlabelled} of {len(targets)} images of {part!r} have no label: name another part."
        )
    encoded = table.select_columns([image]).with_format(None).cast_column(image, _library().Image(decode=False))
    return Rows(encoded, image, part, range(len(targets)), targets)


def _labels(table: Any, label: str) -> list[Any]:
    found: list[Any] = table.with_format(None)[label][:]
    return found


def _test_part(parts: Mapping[str, Any], name: str, options: Options, label: str) -> str | None:
    if options.test:
        if options.test not in parts:
            raise InvalidInput(f"{name!r} has no part {options.test!r}; it has {', '.join(parts)}.")
        return options.test
    known = [each for each in _TESTS if each in parts and each != options.train]
    labelled = [
        each
        for each in known
        if label in parts[each].features and all(y is not None and y >= 0 for y in _labels(parts[each], label))
    ]
    if known and not labelled:
        raise InvalidInput(f"in {name!r}, the images of {' and '.join(known)} have no labels: set the option test.")
    return labelled[0] if labelled else None


def _own_size(images: Rows) -> int:
    """Return the size of the images if the first ones are all alike and square, and else the usual one."""
    found = set()
    for place in range(min(_SEEN, len(images))):
        try:
            found.add(read_image(images.encoded(place)).size)
        except Exception:  # it is told and left out later
            continue
    (width, height) = found.pop() if len(found) == 1 else (0, 1)
    return int(width) if width == height else SIZE

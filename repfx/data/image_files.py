"""Data sets of image files: a folder with one folder per class, or a data set that torchvision knows by name."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from repfx.data.class_names import named_beside
from repfx.data.dataset import DataSet, DataSource, InputForm, PreparedImages, Stages, every_fifth, labels_of
from repfx.data.reading import EncodedImages, ImageFiles, read_image, require_whole, told
from repfx.errors import InvalidInput, first_line
from repfx.onnx.preprocessing import Preprocessing

SIZE = 224
TEST_FOLDERS = ("test", "val", "valid", "validation")
_VALIDATED = ("ImageNet", "Imagenette", "Places365")  # torchvision has no test part of these
_MEANS = {1: (0.449,), 3: (0.485, 0.456, 0.406)}  # of ImageNet, as torchvision's and timm's weights expect
_DEVIATIONS = {1: (0.226,), 3: (0.229, 0.224, 0.225)}
_BYTES = (0.0, 255.0)


def folder(source: DataSource, form: InputForm, preprocessing: Preprocessing | None = None) -> DataSet:
    """Load `path/train/CLASS/…` with `path/test/CLASS/…` (or `val`, `valid`, `validation`); or `path/CLASS/…`.

    In the second layout, every fifth image of a class belongs to the test part.

    Raises:
        InvalidInput: the folder has neither layout, or its two parts have different classes.
    """
    path = Path(source.name)
    prepared = preprocessing or usual(form, form.size or SIZE, source.crop)
    test_folder = next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), None)
    if test_folder is None and any(part.is_dir() for part in (path / "train").glob("*")):
        raise InvalidInput(
            f"{str(path)!r} has a folder train/ of classes, and beside it none of {', '.join(TEST_FOLDERS)}: add one of these."
        )
    if not (path / "train").is_dir() or test_folder is None:
        classes, samples = _samples(path, path)
        chosen = every_fifth(torch.tensor([label for _, label in samples])).tolist()
        parts = [[sample for sample, tests in zip(samples, chosen) if tests == part] for part in (False, True)]
        return _checked(source, parts[0], parts[1], classes, prepared)
    classes, train = _samples(path / "train", path)
    test_classes, test = _samples(test_folder, path)
    if classes != test_classes:
        ways = ((path / "train", classes, test_classes), (test_folder, test_classes, classes))
        found = [
            f"{part.relative_to(path)!s}/ alone has {named_beside([each for each in own if each not in others], others)}"
            for part, own, others in ways
            if {*own} - {*others}
        ]
        raise InvalidInput(f"{str(path)!r} has other classes for training than for testing: {'; '.join(found)}.")
    return _checked(source, train, test, classes, prepared)


_Samples = list[tuple[str, int]]


def _samples(part: Path, folder: Path) -> tuple[list[str], _Samples]:
    """Return the classes in a part of a folder, and the paths and labels of its images."""
    from torchvision.datasets import ImageFolder

    require_whole(part)
    try:
        found = ImageFolder(str(part))
    except FileNotFoundError as error:
        has_folders = any(each.is_dir() for each in part.iterdir())
        found = first_line(error) if has_folders else "it has no folders of images"
        raise InvalidInput(
            f"{str(folder)!r} is no image folder: {found}. It needs one folder of images for each class, or such folders in train/ and "
            f"in one of {', '.join(f'{name}/' for name in TEST_FOLDERS)}."
        ) from error
    return found.classes, found.samples


def _checked(
    source: DataSource, train: _Samples, test: _Samples, classes: list[str], preprocessing: Preprocessing
) -> DataSet:
    if len(classes) < 2:
        raise InvalidInput(f"{source.name!r} has one class alone, {classes[0]!r}: a classifier needs at least two.")
    if not train or not test:
        raise InvalidInput(
            f"{source.name!r} has too few images: a class needs five, because every fifth belongs to the test part."
        )
    return of_encoded(source, ImageFiles(train), ImageFiles(test), tuple(classes), preprocessing)


def of_encoded(
    source: DataSource,
    train: EncodedImages,
    test: EncodedImages,
    classes: tuple[str, ...],
    preprocessing: Preprocessing,
) -> DataSet:
    """Return a data set of encoded images, without the test images that can't be read.

    Training images are read as they are needed, unless `source.strict` asks for all of them to be whole.

    Raises:
        InvalidInput: no test image can be read, or with `source.strict` some image can't be.
    """
    broken = test.check() | (train.check() if source.strict else {})
    if broken and source.strict:
        raise InvalidInput(f"{told(broken, 'image', strict=True)}.")
    if len(broken) == len(test):
        raise InvalidInput(f"{told(broken, 'test image')}: none is left.")
    whole = test.without_unreadable() if broken else test
    return replace(_prepared(source, train, whole, classes, preprocessing), unreadable=broken)


def _prepared(
    source: DataSource, train: Dataset[Any], test: Dataset[Any], classes: tuple[str, ...], preprocessing: Preprocessing
) -> DataSet:
    preprocessing.require_range(*_BYTES, source.name)
    stages = stages_of(preprocessing)
    return DataSet(PreparedImages(train, stages), PreparedImages(test, stages), classes, preprocessing)


def torchvision_data(source: DataSource, form: InputForm, preprocessing: Preprocessing | None = None) -> DataSet:
    """Load a data set of torchvision that has a training and a test part, from `source.root`.

    Raises:
        InvalidInput: torchvision has no data set of that name, the data set has no such parts, or its files aren't there.
    """
    from torchvision import datasets

    known = {name: kind for name, kind in vars(datasets).items() if inspect.isclass(kind)}
    kind = next((kind for name, kind in known.items() if name.lower() == source.name.lower()), None)
    if kind is None:
        forms = "digits, an image folder, an .npz file, hf:NAME, wds:FOLDER or a torchvision data set's name"
        raise InvalidInput(f"no data set {source.name!r}: it must be {forms}.")
    train, test = (_part(kind, source, is_train) for is_train in (True, False))
    preprocessing = preprocessing or usual(form, form.size or _own_size(train), source.crop)
    classes = getattr(train, "classes", None) or range(1 + max(int(labels_of(part).max()) for part in (train, test)))
    named = tuple(map(str, classes))
    if all(isinstance(part, datasets.DatasetFolder) for part in (train, test)):
        return of_encoded(source, ImageFiles(train.samples), ImageFiles(test.samples), named, preprocessing)
    return _prepared(source, train, test, named, preprocessing)


def _part(kind: type[Any], source: DataSource, train: bool) -> Any:
    parameters = inspect.signature(kind).parameters
    options: dict[str, Any] = {}
    if "train" in parameters:
        options["train"] = train
    elif "split" in parameters:
        options["split"] = "train" if train else "val" if kind.__name__ in _VALIDATED else "test"
    else:
        raise InvalidInput(f"torchvision's {kind.__name__} has no training and test parts.")
    if source.download and "download" in parameters:
        options["download"] = True
    try:
        return kind(str(source.root), **options)
    except Exception as error:
        other = (
            "let --download fetch it" if "download" in parameters else "give --data a folder with one folder per class"
        )
        advice = f"put it there, name another --root, or {other}"
        where = f"torchvision's {kind.__name__} is not usable in --root {str(source.root)!r}"
        raise InvalidInput(f"{where} ({first_line(error)}): {advice}.") from error


def _own_size(images: Any) -> int:
    width, height = images[0][0].size
    return int(width) if width == height else SIZE


def usual(form: InputForm, size: int, crop: float) -> Preprocessing:
    """Return how pictures are prepared for a model that is to be trained: as torchvision's and timm's weights expect it."""
    if form.dimensions != 2 or form.channels not in _MEANS:
        raise InvalidInput(
            f"image files have 1 or 3 channels and 2 axes; the model's first conv takes {form.channels} channels and "
            f"{form.dimensions} axes: give --data an .npz file."
        )
    mean, deviation = _MEANS[form.channels], _DEVIATIONS[form.channels]
    return Preprocessing((form.channels, size, size), mean, deviation, 255.0, "crop", crop, value_range=_BYTES)


def input_of(path: Path, stages: Stages) -> Tensor:
    """Return the image in a file as one input of a model, `(channels, *axes)`.

    Raises:
        InvalidInput: the file can't be read as an image.
    """
    try:
        return stages(read_image(path))
    except Exception as error:  # whatever a broken image can fail with
        raise InvalidInput(f"{str(path)!r} can't be read as an image: {first_line(error)}.") from error


def stages_of(preprocessing: Preprocessing) -> Stages:
    """Return the stages from an image file, as PIL opens it, to an input.

    Raises:
        InvalidInput: an input is no picture of 1 or 3 channels.
    """
    from torchvision.transforms import v2

    channels, *axes = preprocessing.shape
    if len(axes) != 2 or channels not in _MEANS:
        raise InvalidInput(
            f"the model takes inputs {preprocessing.shape}; image files have 1 or 3 channels and 2 axes."
        )
    colour = v2.Grayscale(1) if channels == 1 else _to_colour
    normalize = v2.Compose([v2.ToImage(), v2.ToPureTensor(), preprocessing.normalized])
    if preprocessing.fit == "stretch":
        fit = v2.Compose([v2.PILToTensor(), preprocessing.fitted])  # PIL itself always antialiases
        return Stages(tuple(axes), fit, normalize, colour)
    resize = v2.Resize(preprocessing.resized, v2.InterpolationMode(preprocessing.interpolation))
    return Stages(tuple(axes), v2.Compose([resize, v2.CenterCrop(axes)]), normalize, colour)


def _to_colour(image: Any) -> Any:
    return image.convert("RGB")

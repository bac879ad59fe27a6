"""Data sets of image files: a folder with one folder per class, or a data set that torchvision knows by name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from repfx.data.dataset import DataSet, DataSource, InputForm, PreparedImages, Stages, every_fifth, labels_of
from repfx.errors import InvalidInput, first_line

_SIZE = 224
_TEST_FOLDERS = ("test", "val", "valid", "validation")
_VALIDATED = ("ImageNet", "Imagenette", "Places365")  # torchvision has no test part of these
_MEANS = {1: (0.449,), 3: (0.485, 0.456, 0.406)}  # of ImageNet, as torchvision's and timm's weights expect
_DEVIATIONS = {1: (0.226,), 3: (0.229, 0.224, 0.225)}


def folder(source: DataSource, form: InputForm) -> DataSet:
    """Load `path/train/CLASS/…` with `path/test/CLASS/…` (or `val`, `valid`, `validation`); or `path/CLASS/…`.

    In the second layout, every fifth image of a class belongs to the test part.

    Raises:
        InvalidInput: the folder has neither layout, or its two parts have different classes.
    """
    from torchvision.datasets import ImageFolder

    path = Path(source.name)
    stages = _stages(form, form.size or _SIZE, source.crop)
    test_folder = next((path / name for name in _TEST_FOLDERS if (path / name).is_dir()), None)
    if test_folder is None and any(part.is_dir() for part in (path / "train").glob("*")):
        raise InvalidInput(
            f"{str(path)!r} has a folder train/ of classes, and beside it none of {', '.join(_TEST_FOLDERS)}: add one of these."
        )
    try:
        if not (path / "train").is_dir() or test_folder is None:
            images = ImageFolder(str(path))
            test_mask = every_fifth(torch.tensor(images.targets))
            train, test = (Subset(images, mask.nonzero().flatten().tolist()) for mask in (~test_mask, test_mask))
            return _checked(source, train, test, images.classes, stages, form)
        train_images, test_images = (ImageFolder(str(part)) for part in (path / "train", test_folder))
    except FileNotFoundError as error:
        raise InvalidInput(
            f"{str(path)!r} is no image folder (one folder of images per class): {first_line(error)}."
        ) from error
    if train_images.classes != test_images.classes:
        differing = sorted(set(train_images.classes) ^ set(test_images.classes))
        raise InvalidInput(f"{str(path)!r} has other classes for training than for testing: {', '.join(differing)}.")
    return _checked(source, train_images, test_images, train_images.classes, stages, form)


def _checked(
    source: DataSource, train: Dataset[Any], test: Dataset[Any], classes: list[str], stages: Stages, form: InputForm
) -> DataSet:
    if len(classes) < 2:
        raise InvalidInput(f"{source.name!r} has one class alone, {classes[0]!r}: a classifier needs at least two.")
    if not len(train) or not len(test):  # type: ignore[arg-type]
        raise InvalidInput(
            f"{source.name!r} has too few images: a class needs five, because every fifth belongs to the test part."
        )
    prepared = PreparedImages(train, stages), PreparedImages(test, stages)
    return DataSet(*prepared, tuple(classes), _preparation(form, stages, source.crop))


def torchvision_data(source: DataSource, form: InputForm) -> DataSet:
    """Load a data set of torchvision that has a training and a test part, from `source.root`.

    Raises:
        InvalidInput: torchvision has no data set of that name, the data set has no such parts, or its files aren't there.
    """
    from torchvision import datasets

    known = {name: kind for name, kind in vars(datasets).items() if inspect.isclass(kind)}
    kind = next((kind for name, kind in known.items() if name.lower() == source.name.lower()), None)
    if kind is None:
        forms = "digits, an image folder, an .npz file or a torchvision data set's name"
        raise InvalidInput(f"no data set {source.name!r}: it must be {forms}.")
    train, test = (_part(kind, source, is_train) for is_train in (True, False))
    stages = _stages(form, form.size or _own_size(train), source.crop)
    classes = getattr(train, "classes", None) or range(1 + max(int(labels_of(part).max()) for part in (train, test)))
    train, test = PreparedImages(train, stages), PreparedImages(test, stages)
    return DataSet(train, test, tuple(map(str, classes)), _preparation(form, stages, source.crop))


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
    return int(width) if width == height else _SIZE


def _stages(form: InputForm, size: int, crop: float) -> Stages:
    from torchvision.transforms import v2

    if form.dimensions != 2 or form.channels not in _MEANS:
        raise InvalidInput(
            f"image files have 1 or 3 channels and 2 axes; the model's first conv takes {form.channels} channels and "
            f"{form.dimensions} axes: give --data an .npz file."
        )
    colour = v2.Grayscale(form.channels) if form.channels == 1 else _to_colour
    floats = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    normalize = v2.Compose(
        [*floats, v2.Normalize(_MEANS[form.channels], _DEVIATIONS[form.channels]), v2.ToPureTensor()]
    )
    fit = v2.Compose([v2.Resize(round(size / crop)), v2.CenterCrop(size)])
    return Stages((size, size), fit, normalize, colour)


def _to_colour(image: Any) -> Any:
    return image.convert("RGB")


def _preparation(form: InputForm, stages: Stages, crop: float) -> dict[str, Any]:
    """Return how pixels from 0 to 1 are normalized, the shape of an image, and which part of an image file is shown."""
    mean, deviation = list(_MEANS[form.channels]), list(_DEVIATIONS[form.channels])
    return {"mean": mean, "std": deviation, "shape": [form.channels, *stages.size], "crop": crop}

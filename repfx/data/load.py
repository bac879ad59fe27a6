"""Load the data set that `--data` of the command line names, as training and test images of the size that a model takes.

The name is `digits`, an image folder, an `.npz` file, the name of a torchvision data set, `hf:` and the name of a data set for Hugging
Face's `datasets`, or `wds:` and a folder of WebDataset's shards. Nothing is downloaded unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from repfx.data import hugging_face, image_files, web_dataset
from repfx.data.dataset import (
    MOST_CLASSES,
    DataSet,
    DataSource,
    InputForm,
    PreparedImages,
    Stages,
    as_it_is,
    every_fifth,
)
from repfx.errors import InvalidInput, first_line
from repfx.onnx.preprocessing import Preprocessing, stretched

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_DIGITS_SIZE = 16
_Load = Callable[[DataSource, InputForm, "Preprocessing | None"], DataSet]
OF_LIBRARIES: dict[str, _Load] = {
    "hf:": hugging_face.load,
    "wds:": web_dataset.load,
}  # by how names begin; these alone have options


def load_data(source: DataSource, form: InputForm, preprocessing: Preprocessing | None = None) -> DataSet:
    """Load the data set of a source, with its images in the form that a model takes.

    Args:
        preprocessing: how the images are prepared, for a model that has been trained already. None chooses by the form and the data.

    Raises:
        InvalidInput: the data set doesn't exist, is malformed or doesn't fit the model or the preprocessing.
        OSError: a file can't be read.
    """
    path = Path(source.name)
    if prefix := prefix_of(source.name):
        return OF_LIBRARIES[prefix](replace(source, name=source.name.removeprefix(prefix)), form, preprocessing)
    if source.options:
        raise InvalidInput(
            f"data.options has {', '.join(source.options)}, and {source.name!r} takes no options: leave them out."
        )
    if source.name == "digits":
        return _digits(form, preprocessing)
    if path.suffix == ".npz":
        return _arrays(path, form, preprocessing)
    if path.is_dir():
        return image_files.folder(source, form, preprocessing)
    return image_files.torchvision_data(source, form, preprocessing)


def prefix_of(name: str) -> str:
    """Return the beginning of a data set's name that says what loads it; empty for a name without one.

    >>> prefix_of("hf:photographs"), prefix_of("photographs")
    ('hf:', '')
    """
    return next((prefix for prefix in OF_LIBRARIES if name.startswith(prefix)), "")


def _digits(form: InputForm, preprocessing: Preprocessing | None) -> DataSet:
    """Load scikit-learn's 1797 handwritten digits, 8×8. Every fifth of each class belongs to the test part."""
    from sklearn.datasets import load_digits

    if form.dimensions != 2:
        raise InvalidInput(
            f"the digits are images, but the model's first conv is {form.dimensions}d: give --data an .npz file."
        )
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32), torch.tensor(digits.target)
    test = every_fifth(labels)
    size = form.size or _DIGITS_SIZE
    split = (images[~test], labels[~test], images[test], labels[test])
    form = InputForm(form.channels, 2, size)
    return _in_memory("digits", split, form, tuple(map(str, range(10))), (0.0, 16.0), preprocessing)


def _arrays(path: Path, form: InputForm, preprocessing: Preprocessing | None) -> DataSet:
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            missing = [name for name in _ARRAYS if name not in archive]
            if missing:
                raise InvalidInput(f"{str(path)!r} lacks {', '.join(missing)}; it must hold {', '.join(_ARRAYS)}.")
            arrays = [archive[name] for name in _ARRAYS]
    except (InvalidInput, OSError):
        raise
    except Exception as error:  # whatever zip files and headers of arrays can fail with
        raise InvalidInput(f"{str(path)!r} can't be read as arrays: {first_line(error)}.") from error
    x_train, x_test = (_images(arrays[place], _ARRAYS[place], path) for place in (0, 2))
    y_train, y_test = (_labels(arrays[place], _ARRAYS[place], path) for place in (1, 3))
    for name, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if y.ndim != 1 or len(x) != len(y) or not len(y):
            shapes = f"x_{name} is {tuple(x.shape)} and y_{name} is {tuple(y.shape)}"
            raise InvalidInput(f"in {str(path)!r} {shapes}: there must be one label for each of at least one image.")
    classes = int(max(y_train.max(), y_test.max())) + 1
    layout = [_channels_first(x, form, path) for x in (x_train, x_test)]
    split = (layout[0], y_train, layout[1], y_test)
    return _in_memory(str(path), split, form, tuple(map(str, range(classes))), _range(x_train), preprocessing)


def _range(x: Tensor) -> tuple[float, float]:
    """Return the least and the greatest value that a pixel may have, as far as the images show it."""
    low, high = (0.0, 255.0) if x.dtype == torch.uint8 else (float(x.min()), float(x.max()))
    return low, high if high > low else low + 1


def _images(found: numpy.ndarray[Any, Any], name: str, path: Path) -> Tensor:
    if found.dtype.kind not in "biuf":
        raise InvalidInput(f"in {str(path)!r} {name} holds {found.dtype}; images must be real numbers.")
    return torch.from_numpy(found if found.dtype == numpy.uint8 else found.astype(numpy.float32, copy=False))


def _labels(found: numpy.ndarray[Any, Any], name: str, path: Path) -> Tensor:
    """Return the classes as whole numbers, once it is sure that there aren't absurdly many."""
    if found.dtype.kind not in "biu" or (found.size and found.min() < 0):
        raise InvalidInput(f"in {str(path)!r} {name} must hold the classes as whole numbers from 0.")
    if found.size and found.max() >= max(MOST_CLASSES, found.size):
        raise InvalidInput(
            f"in {str(path)!r} {name} has the class {found.max()}: classes are counted from 0, and {found.size} labels can't be of so many."
        )
    return torch.from_numpy(found.astype(numpy.int64))


def _channels_first(x: Tensor, form: InputForm, path: Path) -> Tensor:
    """Turn `(images, *axes)` and `(images, *axes, channels)` into `(images, channels, *axes)`, which itself stays as it is."""
    if not x.isfinite().all():
        raise InvalidInput(f"{str(path)!r} holds numbers that are not finite.")
    if x.ndim == form.dimensions + 1:
        return x[:, None]
    if x.ndim != form.dimensions + 2:
        raise InvalidInput(
            f"{str(path)!r} has images {tuple(x.shape[1:])}; the model's first conv has {form.dimensions} axes."
        )
    known = {1, form.channels}
    if x.shape[1] not in known and x.shape[-1] in known | {3}:
        return x.movedim(-1, 1)
    return x


def _in_memory(
    name: str,
    split: tuple[Tensor, ...],
    form: InputForm,
    classes: tuple[str, ...],
    value_range: tuple[float, float],
    preprocessing: Preprocessing | None,
) -> DataSet:
    """Fit images to the form. Without a preprocessing, standardize by each channel's mean and deviation over the training images."""
    x_train, y_train, x_test, y_test = split
    if preprocessing is None:
        images = [fit_to(x, form) for x in (x_train, x_test)]
        mean, deviation = _moments(images[0])
        moments = tuple(mean.tolist()), tuple(deviation.tolist())
        preprocessing = Preprocessing(tuple(images[0].shape[1:]), *moments, value_range=value_range)
        stages = Stages(preprocessing.shape[1:], as_it_is, preprocessing.normalized)
    else:
        preprocessing.require_range(*value_range, name)
        images = [with_channels(x, preprocessing.shape[0], form.dimensions) for x in (x_train, x_test)]
        stages = Stages(preprocessing.shape[1:], preprocessing.fitted, preprocessing.normalized)
    train, test = (PreparedImages(TensorDataset(x, y), stages) for x, y in zip(images, (y_train, y_test)))
    return DataSet(train, test, classes, preprocessing)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, `(channels,)`, computed a channel at a time so that not all bytes become floats at once."""
    channels = [x[:, channel].double() for channel in range(x.shape[1])]
    mean = torch.stack([channel.mean() for channel in channels])
    deviation = torch.stack([channel.std(correction=0) for channel in channels]).clamp_min(1e-12)
    return mean.float(), deviation.float()


def fit_to(x: Tensor, form: InputForm) -> Tensor:
    """Resize images `(images, channels, *axes)` or `(images, *axes)`, and give them the channels that a model takes.

    >>> fit_to(torch.zeros(2, 8, 8), InputForm(channels=3, dimensions=2, size=32)).shape
    torch.Size([2, 3, 32, 32])
    """
    x = with_channels(x, form.channels, form.dimensions)
    return x if form.size is None else stretched(x, (form.size,) * form.dimensions).contiguous()


def with_channels(x: Tensor, channels: int, dimensions: int) -> Tensor:
    """Give images `(images, channels, *axes)` or `(images, *axes)` the channels that a model takes.

    One channel is repeated. Several channels become their mean if the model takes one.

    Raises:
        InvalidInput: the numbers of channels differ, and none is 1.
    """
    x = x[:, None] if x.ndim == dimensions + 1 else x
    if x.shape[1] != channels and 1 not in (x.shape[1], channels):
        raise InvalidInput(f"the images have {x.shape[1]} channels, the model's first conv takes {channels}.")
    if x.shape[1] != channels:
        x = x if x.shape[1] == 1 else x.float().mean(1, keepdim=True)
        x = x.expand(-1, channels, *x.shape[2:])
    return x.contiguous()

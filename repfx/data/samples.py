"""Real images for quantizing a file to 8 bits: some to measure ranges on, and labelled ones to count changed predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from repfx.data.class_names import matched
from repfx.data.dataset import DataSource, Images, InputForm
from repfx.data.load import load_data
from repfx.data.predictions import check_fit
from repfx.errors import InvalidInput
from repfx.onnx.preprocessing import Preprocessing

_AT_ONCE = 32


@dataclass(frozen=True)
class Samples:
    """Images of a data set that a quantization needs.

    Args:
        calibrate: batches of training images.
        labelled: batches of all test images with their labels.
        example: two test images.
    """

    calibrate: DataLoader[Any]
    labelled: DataLoader[Any]
    example: Tensor


def samples(
    model: nn.Module,
    source: DataSource,
    count: int,
    *,
    shape: tuple[int, ...] | None = None,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] = (),
) -> Samples:
    """Load images of a data set in the form that a classifier takes.

    Args:
        count: number of images to measure ranges on, spread over all training images.
        shape: shape of one image; None keeps the data's own size.
        preprocessing: how the images are prepared that the model was trained on; None chooses by the data.
        classes: names of the classes that the model was trained on, by which the data's are matched; none leaves the labels as they are.

    Raises:
        InvalidInput: the data doesn't exist, the model doesn't take it, or it has other classes or another range of values.
    """
    data = load_data(source, InputForm.of(model, None if preprocessing else _side(shape)), preprocessing)
    if classes:
        data = matched(data, classes, source.name)
    check_fit(model, data, "cpu")
    return Samples(
        DataLoader(evenly(data.train, count), _AT_ONCE),
        DataLoader(data.test, _AT_ONCE),
        torch.stack([data.test[place][0] for place in range(min(2, len(data.test)))]),  # type: ignore[arg-type]
    )


def _side(shape: tuple[int, ...] | None) -> int | None:
    if shape is None:
        return None
    if len(set(shape[1:])) != 1:
        raise InvalidInput(
            f"images of data sets are as high as they are wide, and the model takes {shape}: use repfx.quantize_onnx."
        )
    return shape[-1]


def evenly(images: Images, count: int) -> Images:
    """Return `count` images spread evenly over a data set, or all if there are fewer."""
    total = len(images)  # type: ignore[arg-type]
    count = min(count, total)
    return Subset(images, [place * total // count for place in range(count)])

"""`pictures_of`: the pictures that a run's files are enough for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from repfx.blocks.architecture import Architecture
from repfx.data.image_files import input_of, stages_of
from repfx.onnx.preprocessing import Preprocessing
from repfx.pages.pictures.branch_pairs import difference_map
from repfx.pages.pictures.codes import code_matrices
from repfx.pages.pictures.feature_maps import feature_maps
from repfx.pages.pictures.gradient_chart import gradient_chart
from repfx.pages.pictures.picture import Picture
from repfx.training.runs.history import Epoch


def pictures_of(
    architecture: Architecture | None,
    epochs: Sequence[Epoch],
    models: tuple[nn.Module, nn.Module] | None = None,
    image: tuple[Path, Preprocessing] | None = None,
) -> list[Picture]:
    """Draw all pictures of a run.

    Args:
        architecture: what its search found; None if it was no search.
        epochs: its epochs so far.
        models: its model before and after fusing, for maps of features.
        image: image file whose maps are drawn, and how the run prepares images.

    Raises:
        InvalidInput: the image can't be read, or a model doesn't take it.
    """
    found = [gradient_chart(epochs), difference_map(architecture, epochs)]
    if models is not None and image is not None:
        path, preprocessing = image
        found.append(feature_maps(*models, input_of(path, stages_of(preprocessing))[None]))
    return [*(picture for picture in found if picture is not None), *code_matrices(architecture)]

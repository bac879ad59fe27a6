"""The last steps of an export: raw images, probabilities and metadata, checked in onnxruntime against torch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from repfx.errors import ExportError
from repfx.measuring.difference import differences, worst
from repfx.onnx.file import open_session
from repfx.onnx.metadata import Metadata, write_metadata
from repfx.onnx.preprocessing import Preprocessing
from repfx.onnx.raw_images import give_probabilities, take_raw_images
from repfx.onnx.reference import Reference


def finish(path: Path, metadata: Metadata, reference: Reference, bound: float, *, probabilities: bool) -> None:
    """Let a file take raw images and give probabilities, if that is asked for, and write its metadata.

    Raises:
        ExportError: the file gives something else than torch on images prepared outside.
    """
    preprocessing = metadata.preprocessing if metadata.inside else None
    if preprocessing is not None:
        take_raw_images(path, preprocessing)
    if probabilities:
        give_probabilities(path)
    write_metadata(path, metadata)
    if preprocessing is not None:
        _check_raw(path, preprocessing, reference, bound, probabilities=probabilities)


def _check_raw(
    path: Path, preprocessing: Preprocessing, reference: Reference, bound: float, *, probabilities: bool
) -> None:
    """Compare a file on raw images with torch on the same images prepared outside.

    The images already have the size from which the middle is taken, because resizing rounds differently in each library.
    """
    session = open_session(path)
    batch = session.get_inputs()[0].shape[0]
    size = preprocessing.resized if preprocessing.fit == "crop" else preprocessing.shape[1]
    width = size + 7 if preprocessing.fit == "crop" else preprocessing.shape[2]
    shape = (batch if isinstance(batch, int) else 2, size, width, preprocessing.shape[0])
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), device="cpu").to(torch.uint8)
    (logits,) = reference.run(reference.rounded(preprocessing(images))).values()
    expected: Tensor = logits.softmax(1) if probabilities else logits
    given = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    found = worst(differences([expected], [given]))
    if found.problem or not found.error <= bound:
        raise ExportError(
            f"the file prepares images otherwise than torch: {found.problem or f'off by {found.error:.1e}'} (allowed {bound:.0e})."
        )

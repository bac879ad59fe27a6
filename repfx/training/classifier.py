"""A trained classifier of images, an ONNX file or the folder of a run, which knows its classes and how images are prepared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from repfx.data.class_names import matched
from repfx.data.dataset import DataSet, DataSource, Images, InputForm, PreparedImages, Stages, as_it_is
from repfx.data.image_files import input_of, stages_of
from repfx.data.load import load_data
from repfx.data.predictions import logits_of
from repfx.errors import InvalidInput
from repfx.onnx.file import open_session, package
from repfx.onnx.metadata import Metadata
from repfx.onnx.preprocessing import Preprocessing
from repfx.onnx.raw_images import PROBABILITIES
from repfx.passes.fuse import fuse
from repfx.training.run_folder import RunFolder
from repfx.training.trust import Trust

Runtime = Literal["onnxruntime", "openvino"]
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
_BATCH = 64


@dataclass(frozen=True)
class Classifier:
    """A trained classifier of images.

    Args:
        name: the file or folder that it comes from.
        compute: function from a batch of inputs to `(images, classes)`.
        labels: name of each class.
        preprocessing: how a raw image becomes an input.
        raw: whether it takes raw images, `(1, height, width, channels)` in uint8.
        gives_probabilities: whether `compute` gives probabilities, and not logits.
    """

    name: str
    compute: Callable[[Tensor], Tensor]
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    raw: bool = False
    gives_probabilities: bool = False

    @classmethod
    def open(cls, name: str, *, trust: Trust = False, runtime: Runtime = "onnxruntime") -> Classifier:
        """Open an ONNX file the folder of a finished run or a checkpoint in it, whose model is fused.

        Args:
            trust: as for `RunFolder.load`.
            runtime: what runs an ONNX file.

        Raises:
            InvalidInput: there is no such file, or it doesn't say what its classes are or how images are prepared.
        """
        path = Path(name)
        folder = RunFolder.at(path)
        if folder.path.is_dir():
            return cls._of_run(folder, trust)
        if path.suffix != ".onnx":
            raise InvalidInput(f"{name!r} is neither an ONNX file nor the folder of a training run.")
        if not path.is_file():
            raise InvalidInput(f"there is no file {name!r}.")
        metadata = Metadata.read(path)
        labels, preprocessing = _known(name, metadata.labels, metadata.preprocessing)
        compute, output = _RUNS[runtime](path)
        return cls(name, compute, labels, preprocessing, metadata.inside, output == PROBABILITIES)

    @classmethod
    def _of_run(cls, folder: RunFolder, trust: Trust) -> Classifier:
        setup = folder.setup
        labels, preprocessing = _known(str(folder.path), setup.classes, setup.preprocessing)
        model = fuse(folder.load(trust=trust)).eval()

        def compute(x: Tensor) -> Tensor:
            with torch.no_grad():
                return logits_of(model(x))[:, : len(labels)]

        return cls(str(folder.path), compute, labels, preprocessing)

    @property
    def stages(self) -> Stages:
        """The stages from an image file, as PIL opens it, to what `compute` takes."""
        prepared = stages_of(self.preprocessing)
        return Stages(prepared.size, as_it_is, _to_bytes, prepared.convert) if self.raw else prepared

    def probabilities(self, x: Tensor) -> Tensor:
        """Return `(images, classes)`, each row a distribution."""
        scores = self.compute(x)
        return scores if self.gives_probabilities else scores.float().softmax(1)

    def probabilities_of(self, path: Path) -> Tensor:
        """Return the probabilities `(classes,)` for an image file.

        Raises:
            InvalidInput: the file can't be read as an image.
        """
        return self.probabilities(input_of(path, self.stages)[None])[0]

    def data(self, source: DataSource) -> DataSet:
        """Load a data set, prepared for this classifier, with labels that count its classes.

        Raises:
            InvalidInput: the data doesn't exist or doesn't fit.
        """
        shape = self.preprocessing.shape
        data = load_data(source, InputForm(shape[0], len(shape) - 1), self.preprocessing)
        if self.raw:
            data = replace(data, train=self._raw(data.train), test=self._raw(data.test))
        return matched(data, self.labels, source.name)

    def _raw(self, images: Images) -> Images:
        """Return images as they are in their files."""
        assert isinstance(images, PreparedImages)
        if isinstance(images.raw[0][0], Tensor):
            raise InvalidInput(f"{self.name!r} prepares image files itself: give a folder of them as --data.")
        return PreparedImages(images.raw, self.stages)

    def scores(self, data: DataSet) -> tuple[Tensor, Tensor]:
        """Return the scores `(images, classes)` of all test images, and their labels `(images,)`."""
        loader = DataLoader(data.test, 1 if self.raw else _BATCH)
        pairs = [(self.compute(x), y) for x, y in loader]
        return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def _known(
    name: str, labels: tuple[str, ...], preprocessing: Preprocessing | None
) -> tuple[tuple[str, ...], Preprocessing]:
    if not labels or preprocessing is None:
        lacks = "what its classes are" if not labels else "how images are prepared"
        raise InvalidInput(
            f"{name!r} doesn't say {lacks}: export it with labels= and preprocessing=, as `repfx train` does."
        )
    return labels, preprocessing


def _to_bytes(image: Any) -> Tensor:
    """Turn an image of PIL into `(height, width, channels)` in uint8."""
    pixels = torch.from_numpy(numpy.array(image))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _in_onnxruntime(path: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    session = open_session(path)
    (taken, *_), (given, *_) = session.get_inputs(), session.get_outputs()
    half = "float16" in taken.type

    def compute(x: Tensor) -> Tensor:
        fed = x.half() if half and x.is_floating_point() else x
        return torch.from_numpy(session.run([given.name], {taken.name: fed.numpy()})[0])

    return compute, str(given.name)


def _in_openvino(path: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    try:
        openvino = package("openvino")
    except ImportError as error:
        raise InvalidInput(
            "openvino can't be imported: pip install openvino, or run the file in onnxruntime."
        ) from error
    compiled = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    half = compiled.input(0).element_type == openvino.Type.f16

    def compute(x: Tensor) -> Tensor:
        fed = x.half() if half and x.is_floating_point() else x
        return torch.from_numpy(compiled(fed.numpy())[0].copy())

    return compute, str(compiled.output(0).any_name)


_RUNS: dict[Runtime, Callable[[Path], tuple[Callable[[Tensor], Tensor], str]]] = {
    "onnxruntime": _in_onnxruntime,
    "openvino": _in_openvino,
}

"""Metadata of an exported file: classes, preprocessing, origin. Keys that other readers know are written beside repfx's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from repfx.errors import InvalidInput
from repfx.onnx.file import package
from repfx.onnx.preprocessing import Preprocessing
from repfx.records.journal import journal, to_json
from repfx.records.json_text import parse_json
from repfx.records.version import VERSION

_PRIVATE = ("pkg.torch.onnx.stack_trace",)  # names files of the machine


@dataclass(frozen=True)
class Metadata:
    """The metadata of an ONNX file, or of a program in a ``.pt2`` file.

    Args:
        labels: name of each class, in the order of the logits.
        preprocessing: how a raw image becomes an input. With `inside`, the file does this itself.
        inside: whether the file takes raw images.
        about: further keys with texts, such as `source`, `license` and `journal`.
    """

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    inside: bool = False
    about: Mapping[str, str] = field(default_factory=dict)

    def keys(self) -> dict[str, str]:
        """Return all keys and texts of the file but the hash of its weights.

        `names`, `imgsz`, `task`, `stride`, `batch` and `channels` are those of ultralytics, `id2label` and `preprocessor_config` those of
        Hugging Face's `config.json` and `preprocessor_config.json`.
        """
        found = {**self.about, "repfx": VERSION}
        if self.labels:
            numbered = dict(enumerate(self.labels))
            found |= {"names": repr(numbered), "id2label": json.dumps(numbered), "task": "classify"}
        if self.preprocessing is not None:
            shape = self.preprocessing.shape
            found["preprocessing"] = json.dumps({**self.preprocessing.as_dict(), "inside": self.inside})
            found |= {"imgsz": str(list(shape[1:])), "channels": str(shape[0]), "stride": "1", "batch": "1"}
            if len(shape) == 3 and not self.inside:
                found["preprocessor_config"] = json.dumps(_processor(self.preprocessing))
        return found

    @classmethod
    def read(cls, path: Path) -> Metadata:
        """Read the metadata of a file. A file that repfx hasn't written has none.

        Raises:
            InvalidInput: a key holds something else than it should.
        """
        model = package("onnx").load(path, load_external_data=False)
        found = {entry.key: entry.value for entry in model.metadata_props}
        try:
            labels = parse_json(found.get("id2label", "{}"))
            values = parse_json(found.get("preprocessing", "null"))
            inside = bool(values and values.pop("inside", False))
            preprocessing = None if values is None else Preprocessing.from_dict(values)
            names = tuple(str(labels[str(place)]) for place in range(len(labels)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"the metadata of {str(path)!r} isn't as repfx writes it: {error}.") from error
        return cls(names, preprocessing, inside, found)


def origin_of(model: nn.Module) -> dict[str, str]:
    """Return the key that tells what was done to a model's structure, as JSON text, if anything was."""
    actions = journal(model)
    return {"journal": to_json(actions)} if actions else {}


def _processor(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the preprocessing as Hugging Face's image processors have it."""
    height, width = preprocessing.shape[1:]
    resample = {"bilinear": 2, "bicubic": 3}[preprocessing.interpolation]  # the numbers of PIL
    shared = {
        "do_resize": True,
        "resample": resample,
        "do_rescale": True,
        "rescale_factor": 1 / preprocessing.divisor,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    size = {"height": height, "width": width}
    if preprocessing.fit == "stretch":
        return {**shared, "size": size, "do_center_crop": False}
    return {**shared, "size": {"shortest_edge": preprocessing.resized}, "do_center_crop": True, "crop_size": size}


def write_metadata(path: Path, metadata: Metadata) -> None:
    """Write metadata and a hash of the weights into a file, and remove the paths of the machine that exported it."""
    onnx = package("onnx")
    digest = weights_digest(onnx.load(path))
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for place in reversed(range(len(node.metadata_props))):
            if node.metadata_props[place].key in _PRIVATE:
                del node.metadata_props[place]
    keys = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**keys, **metadata.keys(), "weights_sha256": digest})
    onnx.save(model, path)


def weights_digest(model: Any) -> str:
    """Return the SHA-256 of the initializers of a loaded ONNX model: names, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for weight in sorted(model.graph.initializer, key=lambda each: each.name):
        values = package("onnx").numpy_helper.to_array(weight)
        digest.update(f"{weight.name}:{values.dtype}:{values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()

"""The model card of a training run: what it is, what was measured, how to use it, and what isn't known, all from the run's files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from repfx.data.load import prefix_of
from repfx.records.number_text import duration, engineering, percent
from repfx.training.run_folder import (
    ARCHITECTURE,
    CHECKPOINT,
    EVALUATION,
    INT8,
    METRICS,
    MODEL,
    RECIPE,
    RunFolder,
    Setup,
)
from repfx.training.trust import calls_in

_FORMS = {"plain": "plain", "expanded": "expanded, trained", "fused": "fused", "onnxruntime": "fused, in onnxruntime"}
_SHOWN_CLASSES = 20


def model_card(folder: RunFolder, *, repository: str, license: str | None = None) -> str:
    """Return the card of a finished run, as Markdown with the Hub's metadata at the beginning.

    Args:
        repository: name of the repository, such as ``me/repvgg-digits``.
        license: license of the weights, as the Hub names it, such as ``mit``.

    Raises:
        InvalidInput: the run isn't finished.
    """
    metrics = folder.metrics
    if metrics is None:
        raise folder.unfinished()
    setup = folder.setup
    recipe: Mapping[str, Any] = folder.recipe or {}
    name = str(recipe.get("data", {}).get("name", "unknown data"))
    of_a_hub = bool(prefix_of(name)) and not PurePath(name.removeprefix(prefix_of(name))).is_absolute()
    data = name.removeprefix(prefix_of(name)) if of_a_hub else PurePath(name).name
    parts = [
        _head(license, data, metrics, repository),
        f"# {PurePath(repository).name}\n",
        _what(setup, data),
        _measured(metrics),
        _use(setup, repository),
        _images(setup),
        _limits(metrics, recipe, license),
        _files(folder),
    ]
    return "\n".join(part for part in parts if part)


def _head(license: str | None, data: str, metrics: Mapping[str, Any], repository: str) -> str:
    """Return the Hub's metadata, as YAML. A JSON value is a YAML value, too."""
    accuracy = metrics["accuracy"]["onnxruntime"]
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": data, "type": data},
        "metrics": [{"type": "accuracy", "value": round(accuracy, 6)}],
    }
    entries: dict[str, Any] = {
        "library_name": "repfx",
        "pipeline_tag": "image-classification",
        "tags": ["structural-re-parameterization", "repfx", "onnx"],
        "model-index": [{"name": PurePath(repository).name, "results": [result]}],
    }
    if license is not None:
        entries["license"] = license
    lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items()]
    return "\n".join(["---", *lines, "---\n"])


def _what(setup: Setup, data: str) -> str:
    if setup.schedule is not None:
        how = f"Its branches came and went in training by the schedule `{setup.schedule['name']}`"
    else:
        spec = setup.spec if isinstance(setup.spec, str) else json.dumps(setup.spec)
        how = f"It was trained with the extra branches of `{spec}`"
    return (
        f"`{setup.model.short_name}`, trained on {data}. {how}. The branches are folded, exactly, into plain convs in `{MODEL}`. "
        "Made with repfx.\n"
    )


def _measured(metrics: Mapping[str, Any]) -> str:
    images = metrics["test_images"]
    lines = [
        "## What was measured\n",
        f"On {images} test images:\n",
        "| form | accuracy | parameters | multiply-adds | latency, batch 1 |",
        "|---|---|---|---|---|",
    ]
    for name, title in _FORMS.items():
        accuracy = metrics["accuracy"].get(name)
        cost = metrics["cost"].get(name, {})
        latency = cost.get("latency") if name != "onnxruntime" else metrics["onnx_latency"]
        cells = [
            title,
            "–" if accuracy is None else f"{percent(accuracy)} ± {100 * half_width(accuracy, images):.2f}",
            engineering(cost["parameters"]) if cost else "",
            engineering(cost["macs"]) if cost else "",
            "" if latency is None else duration(latency),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    error = metrics["max_error"]["fused"]
    lines.append(
        f"\n± is the 95 % interval for so many images. Fusing changes the outputs by {error:.1e} of the largest one, in float64. "
        f"It changes the class of {metrics['flips'].get('fused', 0)} test images.\n"
    )
    return "\n".join(lines)


def half_width(share: float, count: int) -> float:
    """Return half the width of Wilson's 95 % interval of a share that was counted.

    >>> round(half_width(0.5, 400), 3)
    0.049
    """
    z = 1.96
    spread = math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return z * spread / (1 + z * z / count)


def _use(setup: Setup, repository: str) -> str:
    known = all(call.is_of_a_library for call in calls_in({"model": asdict(setup.model)}))
    trust = "" if known else ", trust=True"
    lines = [_USE.format(repository=repository, model=MODEL, shape=_shape(setup), trust=trust)]
    if not known:
        built_by = f"The plain model is built by `{setup.model.short_name}`, which isn't in this repository."
        lines.append(f"{built_by} Python must find it.\n")
    return "\n".join(lines)


def _shape(setup: Setup) -> str:
    if setup.preprocessing is None:
        return ""
    return f"  # float32, (images, {', '.join(map(str, setup.preprocessing.shape))})"


_USE = """## How to use it

Without repfx:

```python
import onnxruntime
from huggingface_hub import hf_hub_download

session = onnxruntime.InferenceSession(hf_hub_download("{repository}", "{model}"))
(logits,) = session.run(None, {{"images": images}}){shape}
```

With repfx, in the form that can be trained on:

```python
import repfx.hub

model = repfx.hub.load("{repository}"{trust})
```
"""


def _images(setup: Setup) -> str:
    lines = []
    if setup.preprocessing is not None:
        lines.append("## Images and classes\n")
        lines.append("Images are prepared like this; the metadata of the ONNX file say it, too:\n")
        lines.append(f"```json\n{json.dumps(setup.preprocessing.as_dict())}\n```\n")
    if setup.classes:
        shown = ", ".join(setup.classes[:_SHOWN_CLASSES])
        more = len(setup.classes) - _SHOWN_CLASSES
        lines.append(f"{len(setup.classes)} classes: {shown}{f' and {more} more' if more > 0 else ''}.\n")
    return "\n".join(lines)


def _limits(metrics: Mapping[str, Any], recipe: Mapping[str, Any], license: str | None) -> str:
    training = recipe.get("training", {})
    begun = recipe.get("weights")
    lines = [
        "## Limits\n",
        f"- One training, with seed {training.get('seed', 0)}. Other seeds give other accuracies, and the ± above doesn't show that.",
        f"- Only the {metrics['test_images']} test images of this data were tried: no other data, no disturbed images.",
        "- The latency is that of the machine which trained it.",
    ]
    if begun:
        lines.append(f"- The training began with the weights in `{PurePath(str(begun)).name}`.")
    if license is None:
        lines.append("- No license was given.")
    return "\n".join([*lines, ""])


def _files(folder: RunFolder) -> str:
    what = {
        MODEL: "the fused model",
        INT8: "the model in 8 bits, trained on with rounding",
        CHECKPOINT: "the weights of the training form, and how its structure came about",
        RECIPE: "all settings of the training: `repfx train --recipe recipe.toml` repeats it",
        METRICS: "all numbers",
        EVALUATION: "right and wrong answers by class",
        ARCHITECTURE: "the architecture that the search found",
    }
    lines = [f"- `{name}`: {text}" for name, text in what.items() if (folder.path / name).is_file()]
    return "\n".join(["## Files\n", *lines, ""])

"""`Metrics`: the numbers of a finished run, which `metrics.json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from repfx.records.number_text import plural


@dataclass(frozen=True)
class Cost:
    """The cost of one form of the model, for one image; latency in seconds."""

    parameters: int
    macs: int
    latency: float


@dataclass(frozen=True)
class Int8:
    """Two files in 8 bits, computed as they say: `ptq` is rounded after the training, and `qat` was trained on with rounding.

    Args:
        losses: loss in each epoch with rounding.
        accuracy: accuracy of each file.
        flips: test images whose predicted class differs from the one of the fused model.
        file_error: relative distance of what onnxruntime gives for `qat` from what torch gives for it.
    """

    losses: list[float]
    accuracy: dict[str, float]
    flips: dict[str, int]
    file_error: float


@dataclass(frozen=True)
class Baseline:
    """The run of the plain model with which a run is compared.

    Args:
        run: its folder.
        differing: keys of the recipe in which it was trained otherwise.
    """

    run: str
    differing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metrics:
    """The contents of `metrics.json`. Flips are test images whose predicted class differs from the one before fusing.

    The model is that of `epoch`, which is None for a run that didn't record it. Of image files that couldn't be read and were left out,
    `unreadable` has the reasons by path. From ten classes on, `top5` is the share of test images whose class is among the five most likely.
    With a `baseline`, `accuracy` and `top5` have those of the plain model that was trained, too, as ``plain``. `int8` is None if the recipe
    has no epochs with rounding.
    """

    losses: list[float]
    test_images: int
    accuracy: dict[str, float]
    flips: dict[str, int]
    max_error: dict[str, float]
    cost: dict[str, Cost]
    onnx_latency: float
    epoch: int | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    top5: dict[str, float] = field(default_factory=dict)
    baseline: Baseline | None = None
    int8: Int8 | None = None

    @property
    def notes(self) -> list[str]:
        """Sentences on what is special about the numbers: the epoch that was chosen, and images that are missing."""
        found = []
        if self.epoch is not None and self.epoch < len(self.losses):
            found.append(
                f"The model is that of epoch {self.epoch} of {len(self.losses)}, the best on the test images, whose accuracy that flatters."
            )
        if self.unreadable:
            found.append(
                f"{plural(len(self.unreadable), 'image file')} couldn't be read and had to be left out: see metrics.json."
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Metrics:
        """Return the metrics whose plain values `as_dict` returned."""
        costs = {name: Cost(**cost) for name, cost in values["cost"].items()}
        found = values.get("baseline")
        baseline = None if found is None else Baseline(found["run"], tuple(found["differing"]))
        int8 = values.get("int8")
        return cls(**{**values, "cost": costs, "baseline": baseline, "int8": None if int8 is None else Int8(**int8)})

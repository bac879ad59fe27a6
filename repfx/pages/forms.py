"""The forms of a model side by side: accuracy, cost, and the difference of each from the form before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from repfx.errors import InvalidInput
from repfx.measuring.cost import LayerCount, count_layers, count_macs, count_parameters

TITLES = {"plain": "plain model", "expanded": "training form", "fused": "fused", "onnxruntime": "in onnxruntime"}
INT8_TITLES = {"ptq": "8 bits, rounded", "qat": "8 bits, trained"}


@dataclass(frozen=True)
class Form:
    """One row of the table of forms. Unknown values are None.

    Args:
        title: name of the form.
        accuracy: share of the test images that it classifies correctly.
        top5: share of the test images whose class is among the five most likely.
        flips: test images whose predicted class differs from the training form's, or in 8 bits from the fused form's.
        error: worst relative difference of the outputs from those of the form before.
        parameters: number of parameters.
        macs: multiply-adds for one image.
        latency: seconds for one image.
        count: how many convs and BatchNorms it has.
    """

    title: str
    accuracy: float | None = None
    top5: float | None = None
    flips: int | None = None
    error: float | None = None
    parameters: int | None = None
    macs: int | None = None
    latency: float | None = None
    count: LayerCount | None = None

    def times(self, other: Form | None, field: str) -> float | None:
        """Return a cost as a multiple of another form's; None if either cost is unknown or 0."""
        own, reference = getattr(self, field), getattr(other, field, None)
        return own / reference if own and reference else None


def forms_of_run(metrics: Mapping[str, Any]) -> dict[str, Form]:
    """Read the forms from the values of a run's `metrics.json`, by the names that they have there.

    Raises:
        InvalidInput: the values aren't those that `repfx train` writes.
    """
    try:
        return _forms(metrics)
    except (AttributeError, TypeError) as error:
        raise InvalidInput("the metrics of the run are none that `repfx train` wrote.") from error


def _forms(metrics: Mapping[str, Any]) -> dict[str, Form]:
    names = ("accuracy", "top5", "flips", "max_error", "cost")
    accuracy, top5, flips, errors, costs = (metrics.get(key) or {} for key in names)
    forms = {}
    for name in dict.fromkeys([*TITLES, *costs, *accuracy]):
        cost = costs.get(name, {})
        latency = metrics.get("onnx_latency") if name == "onnxruntime" else cost.get("latency")
        measured = [found.get(name) for found in (accuracy, top5, flips, errors)]
        known = (*measured, cost.get("parameters"), cost.get("macs"), latency)
        if not all(value is None or isinstance(value, (int, float)) for value in known):
            raise TypeError(f"{name}: {known}")
        if any(value is not None for value in known):
            forms[name] = Form(TITLES.get(name, name), *known)
    return forms


def int8_forms(metrics: Mapping[str, Any]) -> dict[str, Form]:
    """Read the forms in 8 bits from the values of a run's `metrics.json`, by the names that they have there; none if it has none.

    Raises:
        InvalidInput: the values aren't those that `repfx train` writes.
    """
    found = metrics.get("int8") or {}
    accuracy, flips = found.get("accuracy") or {}, found.get("flips") or {}
    numbers = [*accuracy.values(), *flips.values()]
    if not {*accuracy, *flips} <= {*INT8_TITLES} or not all(isinstance(each, (int, float)) for each in numbers):
        raise InvalidInput("the metrics of the run are none that `repfx train` wrote.")
    return {
        name: Form(title, accuracy[name], flips=flips.get(name))
        for name, title in INT8_TITLES.items()
        if name in accuracy
    }


def form_of_model(title: str, model: nn.Module, x: Tensor) -> Form:
    """Measure what a model costs for one image. MACs are None if the model can't run on `x`."""
    try:
        macs = count_macs(model, x[:1])
    except Exception:  # the model's code may raise anything; another part of the page says that it can't run
        macs = None
    return Form(title, parameters=count_parameters(model), macs=macs, count=count_layers(model))

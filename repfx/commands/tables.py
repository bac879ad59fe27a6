"""Tables that the command line prints, made with rich."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from repfx.measuring.cost import count_layers, count_macs, count_parameters
from repfx.onnx.quantization_report import QuantizationReport
from repfx.profiling.profile import Profile
from repfx.records.number_text import duration, engineering
from repfx.training.evaluation import Evaluation
from repfx.training.runs.metrics import Metrics
from repfx.training.sweep import Row, short_keys, text_of

_TITLES = {"plain": "plain", "expanded": "expanded", "fused": "fused", "onnxruntime": "in onnxruntime"}
_WHOLE = 16  # letters of a name or a value of an option that aren't broken
_INT8_TITLES = {"ptq": "8 bits, rounded", "qat": "8 bits, trained"}


def metrics_table(metrics: Metrics) -> Table:
    """Show the metrics of a run, one row for each form of the model."""
    five = ["top 5"] if metrics.top5 else []
    table = _table("", "accuracy", *five, f"flips of\n{metrics.test_images}", "para-\nmeters", "MACs", "latency")
    for name, title in _TITLES.items():
        accuracy = f"{metrics.accuracy[name]:.2%}" if name in metrics.accuracy else "–"
        flips = str(metrics.flips[name]) if name in metrics.flips else "–"
        cost = metrics.cost.get(name)
        parameters, macs = (engineering(cost.parameters), engineering(cost.macs)) if cost else ("", "")
        latency = cost.latency if cost else metrics.onnx_latency
        among = [f"{metrics.top5[name]:.2%}" if name in metrics.top5 else "–"] if five else []
        table.add_row(title, accuracy, *among, flips, parameters, macs, f"{latency * 1e3:.2f} ms")
    if metrics.int8 is not None:
        for name, title in _INT8_TITLES.items():
            among = ["–"] if five else []
            table.add_row(title, f"{metrics.int8.accuracy[name]:.2%}", *among, str(metrics.int8.flips[name]))
    return table


def fusion_table(forms: Mapping[str, nn.Module], x: Tensor) -> Table:
    """Show the size of each form of a model, one row each; MACs are for one image of `x`."""
    table = _table("", "convs", "BatchNorms", "parameters", "MACs")
    for name, model in forms.items():
        layers = count_layers(model)
        counts = str(layers.convs), str(layers.norms)
        table.add_row(name, *counts, engineering(count_parameters(model)), engineering(count_macs(model, x[:1])))
    return table


def quantization_table(report: QuantizationReport) -> Table:
    """Show a quantization report, one row for each layer. Layers below the report's bound are marked."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("layer", overflow="fold", min_width=8)
    for column in (
        "largest\nweight",
        "× median\nchannel",
        "outputs",
        "99.9 %\nin",
        "weights\nSQNR",
        "range\nSQNR",
        "outputs\nSQNR",
    ):
        wraps = column == "outputs"  # a range may take two lines
        table.add_column(column, justify="right", no_wrap=not wraps, min_width=9 if wraps else None)
    for layer in report.layers:
        table.add_row(
            layer.name,
            f"{layer.weight_range:.3g}",
            f"{layer.channel_spread:.1f}",
            f"{layer.low:.3g} to {layer.high:.3g}",
            f"{layer.share:.0%}",
            f"{layer.weight_sqnr:.1f} dB" if layer.quantized else "float32",
            f"{layer.range_sqnr:.1f} dB",
            f"{layer.output_sqnr:.1f} dB",
            style="bold red" if layer.output_sqnr < report.bound else None,
        )
    return table


def confusion_table(evaluation: Evaluation) -> Table:
    """Show each class that has images: how many, how many are predicted right, and what it is mistaken for most often."""
    table = _table("class", "images", "right", "mistaken for")
    totals = evaluation.confusion.sum(1).tolist()
    mistaken: dict[str, str] = {}
    for true, predicted, count in evaluation.confused:
        mistaken.setdefault(true, f"{predicted} ({count})")
    for name, total in zip(evaluation.labels, totals):
        if total:
            table.add_row(Text(name), str(total), f"{evaluation.by_class[name]:.2%}", Text(mistaken.get(name, "")))
    return table


def profile_table(found: Profile, rows: int) -> Table:
    """Show the layers that take the most time, before and after fusing, and why one is no quicker."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("layer")
    table.add_column("made\nfrom", justify="right", no_wrap=True)
    for column in ("before\nms", "after\nms", "MACs"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("limited by")
    for row in found.rows[:rows]:
        times = ["–" if timing is None else str(timing).removesuffix(" ms") for timing in (row.before, row.after)]
        macs = "" if row.work is None else engineering(row.work.macs)
        name = Text(row.path or "(the model)")
        name.append(f"\n{row.layer}" if row.layer else "", style="dim")
        merged = str(row.merged) if row.merged > 1 else ""
        table.add_row(
            name, merged, *times, macs, Text(row.limit if row.gains or not row.reason else f"{row.limit}; {row.reason}")
        )
    return table


def sweep_table(keys: Sequence[str], rows: Sequence[Row]) -> Table:
    """Show the results of a sweep, one row for each choice of values. Its columns begin with the options that the sweep is over."""
    table = Table(box=SIMPLE_HEAD)
    names = short_keys(keys)
    for key in keys:
        longest = max(map(len, (names[key], *(text_of(row.values[key]) for row in rows))))
        table.add_column(Text(names[key]), overflow="fold", no_wrap=longest <= _WHOLE)
    for column in ("runs", "accuracy", "±", "MACs\ntrained", "MACs\nfused", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        accuracy, macs, fused, seconds = map(row.mean, ("accuracy", "macs", "fused_macs", "seconds"))
        finished = str(row.runs) if row.runs == len(row.results) else f"{len(row.results)} of {row.runs}"
        table.add_row(
            *(Text(text_of(row.values[key])) for key in keys),
            finished,
            "–" if accuracy is None else f"{accuracy:.2%}",
            "" if row.deviation is None else f"{row.deviation:.2%}",
            "–" if macs is None else engineering(macs),
            "–" if fused is None else engineering(fused),
            "–" if seconds is None else duration(seconds),
        )
    return table


def plain_table(*columns: str) -> Table:
    """Return an empty table whose columns begin at the left."""
    table = Table(box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column)
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table

"""Tables of measurements, written from the committed results of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def latency() -> str:
    """Write the results of `benchmarks/latency.py`: for each machine, the ratios of each form in each runtime."""
    parts = []
    for file in sorted(RESULTS.glob("latency-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        runtimes = list(dict.fromkeys(row["runtime"] for row in result["rows"]))
        cells: dict[tuple[str, str], list[str]] = {}
        for row in result["rows"]:
            ratio = f"{row['ratio']:.3f} ({row['low']:.3f}–{row['high']:.3f})"
            cells.setdefault((f"{row['model']}, `{row['spec']}`", row["form"]), []).append(ratio)
        setting = f"{result['hardware']}; input {result['input']}; torch {result['torch']}, onnxruntime {result['onnxruntime']}"
        parts += [f"{setting}:", table(("model", "form", *runtimes), [(*key, *row) for key, row in cells.items()])]
    return "\n\n".join(parts)


def deployment() -> str:
    """Write the results of `benchmarks/deployment.py`: for each machine, the latency of each file relative to the fused one's."""
    parts = []
    for file in sorted(RESULTS.glob("deployment-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        forms = [form for form in dict.fromkeys(row["form"] for row in result["rows"]) if form != "fused"]
        cells: dict[str, dict[str, str]] = {}
        for row in result["rows"]:
            cells.setdefault(row["model"], {})[row["form"]] = _deployed(row)
        rows = [(model, *(found[form] for form in ("fused", *forms))) for model, found in cells.items()]
        tools = ", ".join(f"{name} {result[name]}" for name in ("torch", "timm", "onnxruntime", "onnxsim", "onnxslim"))
        parts += [f"{result['hardware']}; {tools}:", table(("model", "fused", *forms), rows)]
    return "\n\n".join(parts)


def _deployed(row: dict[str, Any]) -> str:
    if "problem" in row:
        return str(row["problem"])
    convs = f"{row['convs']} → {row['convs_run']} convs"
    return convs if row["form"] == "fused" else f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f}), {convs}"


def onnx_files() -> str:
    """Write the results of `benchmarks/onnx_files.py`: for each machine, the latency of what each tool makes of a file."""
    parts = []
    for file in sorted(RESULTS.glob("onnx-files-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        runtimes = list(dict.fromkeys(row["runtime"] for row in result["rows"] if "runtime" in row))
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for row in result["rows"]:
            found = cells.setdefault((row["model"], row["tool"]), {"convs": str(row.get("convs", row.get("problem")))})
            if "runtime" in row:
                found[row["runtime"]] = f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f})"
        rows = [
            (*key, found["convs"], *(found.get(runtime, "") for runtime in runtimes)) for key, found in cells.items()
        ]
        tools = ", ".join(
            f"{name} {result[name]}"
            for name in ("torch", "onnxruntime", "onnxsim", "onnxslim", "onnxscript", "openvino")
        )
        parts += [f"{result['hardware']}; {tools}:", table(("model", "made by", "convs", *runtimes), rows)]
    return "\n\n".join(parts)


def compiled() -> str:
    """Write the results of `benchmarks/compiled.py`."""
    parts = []
    for file in sorted(RESULTS.glob("compiled-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            (
                row["candidate"],
                f"{row['ratio']:.3f} ({row['low']:.3f}–{row['high']:.3f})",
                f"{row['compile']:.0f} s",
                str(row["graphs"]),
            )
            for row in result["rows"]
        ]
        setting = f"{result['hardware']}; input {result['input']}; torch {result['torch']}:"
        parts += [setting, table(("candidate", "compiled step / eager step", "to compile", "graphs"), rows)]
    return "\n\n".join(parts)


def drift(name: str = "drift") -> str:
    """Write a result of `benchmarks/drift.py`: for each model, how far each way moves its output."""
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    later = [key for key in result["rows"][0] if key.startswith("drift")]
    after = [f"eval output, after {key.removeprefix('drift ')} passes" for key in later]
    head = ("model", "way", "eval output, at once", "in training mode, at once", *after)
    keys = ("eval", "train", *later)
    rows = [
        (row["model"], row["way"], *(f"{row[key]:.1e}" if row[key] else "0" for key in keys)) for row in result["rows"]
    ]
    setting = f"γ at first {result['gamma']}; input {result['input']}; torch {result['torch']}"
    return f"{table(head, rows)}\n\nRelative to the largest output; {setting}."


def launches() -> str:
    """Write the results of `benchmarks/launches.py`: the operations of a step, then its seconds."""
    result = json.loads((RESULTS / "launches.json").read_text(encoding="utf-8"))
    columns = ("CPU", "GPU")
    counted = [
        (row["what"], *(str(row.get(column, "")) for column in columns))
        for row in result["rows"]
        if "seconds" not in row
    ]
    timed = [
        (row["what"], f"{row['seconds']:.3f} s", f"{row['relative to plain']:.2f} ({row['low']:.2f}–{row['high']:.2f})")
        for row in result["rows"]
        if "seconds" in row
    ]
    setting = f"{result['hardware']}; input {result['input']}; torch {result['torch']}:"
    times = table(("ResNet-18", "seconds", "relative to plain (95 %)"), timed)
    return "\n\n".join([table(("ResNet-18", *columns), counted), setting, times])


def merging() -> str:
    """Write the results of `benchmarks/merging.py`: for each net, the convs of each form and its latency."""
    result = json.loads((RESULTS / "merging-cpu.json").read_text(encoding="utf-8"))
    rows = [
        (
            row["net"],
            row["form"],
            str(row["convs"]),
            f"{row['weights'] / 1e6:.2f} M",
            f"{row['milliseconds']:.2f} ms",
            f"{row['ratio']:.3f} ({row['low']:.3f}–{row['high']:.3f})",
        )
        for row in result["rows"]
    ]
    head = ("net", "form", "convs", "their weights", "latency", "relative to the form by weights (95 %)")
    return f"{result['hardware']}; input {result['input']}; torch {result['torch']}:\n\n{table(head, rows)}"


def observation() -> str:
    """Write the results of `benchmarks/observation.py`."""
    parts = []
    for file in sorted(RESULTS.glob("observation-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            (
                row["form"],
                f"`{row['metric']}`",
                f"{row['step'] * 1e3:.0f} ms",
                f"{row['median']:.4f} ({row['low']:.4f}–{row['high']:.4f})",
            )
            for row in result["rows"]
        ]
        setting = f"ResNet-18, input {result['input']}; {result['hardware']}; torch {result['torch']}:"
        parts += [setting, table(("form", "saliency", "step", "with observation / without"), rows)]
    return "\n\n".join(parts)


def processes() -> str:
    """Write the results of `benchmarks/processes.py`: where the time of each process of a search goes."""
    tables = []
    for file in sorted(RESULTS.glob("processes-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        parts = ("data", "steps", "tests", "scoring", "rest")
        rows = [
            (
                str(row["workers"]),
                str(row["rank"]),
                f"{row['seconds']:.0f}",
                *(f"{100 * row[part]:.1f} %" for part in parts),
            )
            for row in result["rows"]
        ]
        told = f"{result['epochs']} epochs, a batch of {result['batch']}, {result['population']} candidates; {result['note']}"
        tables.append(f"{told.rstrip('; ')}; {result['hardware']}; torch {result['torch']}:")
        tables.append(table(("workers", "process", "seconds", "waiting for data", *parts[1:]), rows))
    return "\n\n".join(tables or ["No result is here yet."])


def scoring() -> str:
    """Write the results of `benchmarks/scoring.py`, in the form of IRepNAS, table 1."""
    parts = []
    for file in sorted(RESULTS.glob("scoring-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        sizes = list(dict.fromkeys(row["population"] for row in result["rows"]))
        cells: dict[tuple[str, str], list[str]] = {}
        for row in result["rows"]:
            saved = f" (−{row['saved']:.1%})" if row["form"] != "multi-branch" else ""
            cells.setdefault((row["model"], row["form"]), []).append(f"{row['seconds']:.0f} s{saved}")
        counts = f"scaled from {result['candidates']} candidates of each model, scored on {result['images']} images"
        setting = f"{result['hardware']}; batches {result['input']}; torch {result['torch']}; {counts}:"
        parts += [setting, table(("model", "form", *map(str, sizes)), [(*key, *row) for key, row in cells.items()])]
    return "\n\n".join(parts)


def search() -> str:
    """Write the result of `benchmarks/search.py`: what each search found, seed by seed."""
    result = json.loads((RESULTS / "search.json").read_text(encoding="utf-8"))
    rows = []
    for name in dict.fromkeys(row["search"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["search"] == name]
        found = ", ".join(str(row["found"]) for row in own)
        errors = ", ".join(f"{row['error']:.1e}" for row in own)
        rows.append((f"`{name}`", f"{found} of {own[0]['budget']}", errors))
    head = (
        "search",
        "right branches, seed by seed",
        "error of the fused net, relative to the variance of the targets",
    )
    return f"{table(head, rows)}\n\n{result['epochs']} epochs of search, then as many of training; kinds: {result['kinds']}."


def gates() -> str:
    """Write the results of `benchmarks/gates.py`."""
    parts = []
    for file in sorted(RESULTS.glob("gates-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            (
                row["budget"],
                *(f"{row[key]:.2f}" for key in ("step_to_plain", "memory_to_plain")),
                *(f"{row[key]:.0%}" if key in row else "" for key in ("branch_time", "branch_memory")),
            )
            for row in result["rows"]
        ]
        head = (
            "budget",
            "step / plain step",
            "memory / plain",
            "share of the branches' whole time",
            "share of their whole memory",
        )
        parts += [f"{result['hardware']}; input {result['input']}; torch {result['torch']}:", table(head, rows)]
    return "\n\n".join(parts)


def training() -> str:
    """Write the results of `benchmarks/training.py`."""
    parts = []
    for file in sorted(RESULTS.glob("training-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            (
                row["net"],
                row["candidate"],
                f"{row['step']:.3g} s",
                f"{row['step_ratio']:.2f}",
                f"{row['memory'] / 2**20:.0f} MiB" if "memory" in row else "",
                f"{row['memory_ratio']:.2f}" if "memory" in row else "",
                row["against"],
                f"{row['step_to_textbook']:.2f}" if "step_to_textbook" in row else "",
            )
            for row in result["rows"]
        ]
        head = ("net", "candidate", "step", "ratio", "memory", "ratio", "ratios to", "step / textbook DBB")
        setting = f"{result['hardware']}; {result['setting']}; torch {result['torch']}:"
        parts += [setting, table(head, rows)]
    return "\n\n".join(parts)


def transforms() -> str:
    """Write the results of `benchmarks/transforms.py`, one table for each question."""
    parts = []
    for file in sorted(RESULTS.glob("transforms-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        questions: dict[str, list[dict[str, Any]]] = {}
        for row in result["rows"]:
            questions.setdefault(row["asks"], []).append(row)
        versions = f"torch {result['torch']}, timm {result['timm']}, Python {result['python']}"
        parts += [f"{result['hardware']}; {versions}; scaling with `{result['spec']}`:"]
        parts += [_scaling(questions["scaling"]), _memory(questions["memory"]), _beside_timm(questions["timm"])]
    return "\n\n".join(parts)


def _scaling(rows: list[dict[str, Any]]) -> str:
    sizes = list(dict.fromkeys(row["convs"] for row in rows))
    cells: dict[str, list[str]] = {}
    for row in rows:
        ratio = "" if row["convs"] == sizes[0] else f": {_with_interval(row)}"
        if row["collector"] == "on":
            cells.setdefault(row["transform"], []).append(f"{row['milliseconds']:.3g} ms{ratio}")
        elif row["convs"] == sizes[-1]:
            cells[row["transform"]].append(f"{row['ratio']:.2f}")
    head = ("per conv", *(f"of {size:,} convs" for size in sizes), f"{sizes[-1]:,} / {sizes[0]}, collector off")
    return table(head, [(f"`{name}`", *row) for name, row in cells.items()])


def _memory(rows: list[dict[str, Any]]) -> str:
    head = ("`fuse` of", "with", "the model", "fused", "layer in float64", "peak", "(peak − model) / layer")
    sizes = ("copy", "fused", "layer", "peak")
    return table(
        head,
        [
            (
                row["net"],
                f"`{row['form']}`",
                *(f"{row[key] / 2**20:.3g} MiB" for key in sizes),
                f"{row['layers_beyond']:.1f}",
            )
            for row in rows
        ],
    )


def _beside_timm(rows: list[dict[str, Any]]) -> str:
    head = ("model", "timm", "repfx", "repfx / timm", "BatchNorms", "left by timm", "left by repfx")
    norms = ("norms", "norms_of_timm", "norms_of_repfx")
    return table(
        head,
        [
            (
                row["model"],
                *(f"{row[way]:.2g} s" for way in ("timm", "repfx")),
                _with_interval(row),
                *(str(row[key]) for key in norms),
            )
            for row in rows
        ],
    )


def _with_interval(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f})"


def quantization() -> str:
    """Write the result of `benchmarks/quantization.py`: what each rounding costs each form, and the ranges of its numbers."""
    result = json.loads((RESULTS / "quantization.json").read_text(encoding="utf-8"))
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["rounding"], row["form"]), []).append(row)

    def mean(rows: list[dict[str, Any]], key: str) -> float:
        return float(sum(row[key] for row in rows) / len(rows))

    def change(rows: list[dict[str, Any]], key: str) -> str:
        return ", ".join(f"{100 * (row[key] - row['float32']):+.2f}" for row in rows)

    cost = [
        (
            rounding,
            f"`{form}`",
            f"{mean(rows, 'float32'):.1%}",
            ", ".join(f"{row['flips'] / row['images']:.1%}" for row in rows),
            change(rows, "int8"),
            ", ".join(f"{row['lowest_sqnr']:.1f}" for row in rows),
        )
        for (rounding, form), rows in groups.items()
    ]
    ranges = [
        (
            f"`{form}`",
            *(f"{mean(rows, key):.3g}" for key in ("median_weight_range", "median_channel_spread", "median_high")),
        )
        for (rounding, form), rows in groups.items()
        if rounding == result["rows"][0]["rounding"]
    ]
    head = (
        "weights",
        "branches",
        "accuracy in float32",
        "images in another class",
        "change of accuracy, in points",
        "lowest SQNR of a conv's outputs, dB",
    )
    setting = (
        f"{result['images']} images of {result['data']}, {result['input']}, {result['epochs']} epochs; "
        f"{result['rows'][0]['images']} test images, "
        f"{result['calibration']} for calibration; torch {result['torch']}, onnxruntime {result['onnxruntime']}. Seed by seed."
    )
    ranges_head = (
        "branches",
        "largest weight of a conv",
        "that, relative to the median channel's",
        "largest output of a conv",
    )
    return f"{table(head, cost)}\n\n{setting}\n\n{table(ranges_head, ranges)}\n\nMedians over the convs, means over the seeds."


def qat() -> str:
    """Write the results of `benchmarks/qat.py`: what each way of rounding costs the accuracy, by branches."""
    parts = []
    for rows in _rows_of_qat():
        first = rows[0]
        ways = [way for way in first["accuracy"] if way != "float32"]
        cost = []
        for form, own in _by_form(rows).items():
            exact = [row["accuracy"]["float32"] for row in own]
            changes = [
                ", ".join(f"{100 * (row['accuracy'][way] - before):+.2f}" for row, before in zip(own, exact))
                for way in ways
            ]
            cost.append((f"`{form}`", f"{sum(exact) / len(exact):.1%}", *changes))
        setting = (
            f"{first['training_images']} images of {first['data']}, {first['epochs']} epochs and {first['more']} more; "
            f"{first['images']} test images; {first['hardware']}; torch {first['torch']}, onnxruntime {first['onnxruntime']}. "
            "In points, seed by seed."
        )
        parts += [table(("branches", "accuracy in float32", *ways), cost), setting]
    return "\n\n".join(parts)


def qat_ranges() -> str:
    """Write the ranges of the fused nets in the results of `benchmarks/qat.py`, by branches."""
    parts = []
    for rows in _rows_of_qat():
        head = (
            "branches",
            "largest weight of a conv",
            "that, relative to the median channel's",
            "largest output of a conv",
            "lowest SQNR of a conv's outputs, dB",
            "images in another class",
        )
        keys = ("median_weight_range", "median_channel_spread", "median_high", "lowest_sqnr")
        way = "rounded, a scale for each channel"
        lines = []
        for form, own in _by_form(rows).items():
            means = [f"{sum(row['ranges'][way][key] for row in own) / len(own):.3g}" for key in keys]
            flips = ", ".join(f"{row['flips'][way] / row['images']:.1%}" for row in own)
            lines.append((f"`{form}`", *means, flips))
        parts.append(table(head, lines))
    return "\n\n".join(parts)


def _rows_of_qat() -> Iterator[list[dict[str, Any]]]:
    for file in sorted(RESULTS.glob("qat-*.jsonl")):
        yield [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _by_form(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    forms = dict.fromkeys(row["form"] for row in rows)
    return {form: [row for row in rows if row["form"] == form] for form in forms}


def equalization() -> str:
    """Write the results of `benchmarks/equalization.py`, by library."""
    result = json.loads((RESULTS / "equalization.json").read_text(encoding="utf-8"))
    lines = []
    for library in ("torchvision", "timm"):
        rows = [row for row in result["rows"] if row["name"].startswith(f"{library}/") and "left_out" not in row]
        touched = [row for row in rows if "error" in row]
        worst = [f"{median(row[f'worst_{when}'] for row in touched):.2f}" for when in ("before", "after")]
        narrower = sum(row["worst_after"] < row["worst_before"] for row in touched)
        error = max(row["error"] for row in touched)
        lines.append(
            (library, str(len(rows)), str(len(touched)), f"{error:.0e}" if error else "0", *worst, str(narrower))
        )
    head = ("", "classifiers", "where factors pass", "largest error", "worst ratio before", "after", "narrower in")
    return table(head, lines)


def tracked() -> str:
    """Write the results of `benchmarks/tracked.py`: accuracy and cost of each method, over the seeds that all methods have."""
    parts = []
    for file in sorted(RESULTS.glob("tracked-*.jsonl")):
        from benchmarks.tracked import HEAD, compared, rows_of  # loads torch

        rows = rows_of(file)
        first, seeds = rows[0], len({row["seed"] for row in rows})
        setting = f"CIFAR-{first['classes']}, {first['images']} images, {seeds} seeds; {first['hardware']}"
        parts += [f"{setting}:", table(HEAD, compared(rows))]
    return "\n\n".join(parts)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Write a table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


MEASUREMENTS: dict[str, Callable[[], str]] = {
    "latency": latency,
    "deployment": deployment,
    "onnx_files": onnx_files,
    "compiled": compiled,
    "drift": drift,
    "drift_structures": partial(drift, "drift-structures"),
    "launches": launches,
    "merging": merging,
    "observation": observation,
    "processes": processes,
    "scoring": scoring,
    "search": search,
    "gates": gates,
    "tracked": tracked,
    "training": training,
    "transforms": transforms,
    "quantization": quantization,
    "equalization": equalization,
    "qat": qat,
    "qat_ranges": qat_ranges,
}

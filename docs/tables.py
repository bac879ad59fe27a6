"""The tables of what is registered and of options, written from the code, and those of measurements; a hook of the docs' build.

A page asks for one with ``<!-- table: presets -->`` on a line of its own. Whatever is registered shows up by itself.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MARK = re.compile(r"^<!-- table: (\w+) -->$", re.MULTILINE)


def presets() -> str:
    """Each preset with the branches that it puts beside a site's own conv."""
    from repfx.spec import PRESETS, Spec

    def branches(spec: Spec) -> str:
        if callable(spec.branches):
            return "depends on the window"
        return ", ".join(f"`{getattr(branch, 'kind', branch)}`" for branch in spec.branches)

    rows = [(f"`{preset.name}`", branches(preset.spec), preset.description) for preset in PRESETS.values()]
    return _table(("preset", "branches beside the site's own conv", "what it is"), rows)


def branches() -> str:
    """Each branch kind with the first line of its class's docstring."""
    from repfx.branch import KINDS

    rows = [(f"`{kind}`", _first_line(cls), f"`{_file_of(cls)}`") for kind, cls in KINDS.items()]
    return _table(("kind", "what it is", "file"), rows)


def passes() -> str:
    """Each pass: a verb on models, or a rule that `fuse` runs."""
    from repfx.rule import PASSES, RULES

    rows = [(f"`{name}`", "rule" if name in RULES else "verb", each.description) for name, each in PASSES.items()]
    return _table(("pass", "sort", "what it does"), sorted(rows, key=lambda row: row[1], reverse=True))


def schedules() -> str:
    """Each schedule with the first line of its class's docstring."""
    from repfx.schedule import SCHEDULES

    rows = [(f"`{name}`", _first_line(cls), f"`{_file_of(cls)}`") for name, cls in SCHEDULES.items()]
    return _table(("schedule", "what it is", "file"), rows)


def recipes() -> str:
    """Each shipped recipe with its first line."""
    from repfx.recipe_file import description_of, shipped_recipes

    rows = [(f"`{name}`", description_of(path)) for name, path in shipped_recipes().items()]
    return _table(("recipe", "what it is"), rows)


def recipe_keys() -> str:
    """Each key of a recipe's file with its default and what its dataclass says of it."""
    from repfx.experiment import Experiment

    elsewhere = ("out", "overwrite", "resume")  # where a run goes is no part of its recipe
    rows = [row for row in _keys(Experiment) if row[0].strip("`") not in elsewhere]
    return _table(("key", "default", "what it is"), rows)


def _keys(cls: Any, inside: str = "") -> Iterator[tuple[str, str, str]]:
    """Of a dataclass, and of those that it holds, with dots between."""
    told, kinds = _arguments(cls), get_type_hints(cls)
    for field in fields(cls):
        inner = next((each for each in (kinds[field.name], *get_args(kinds[field.name])) if is_dataclass(each)), None)
        if inner is None:
            default = "" if field.default in (MISSING, None, "") else f"`{json.dumps(field.default, default=str)}`"
            yield f"`{inside}{field.name}`", default, told[field.name]
        else:
            yield from _keys(inner, f"{inside}{field.name}.")


def _arguments(cls: type) -> dict[str, str]:
    """What a docstring says under `Args:`, by name; `mixup, cutmix: …` is of both."""
    text = inspect.cleandoc(cls.__doc__ or "").split("Args:\n")[1].split("\n\n")[0]
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n        .*)*)", text, re.MULTILINE)
    return {name: " ".join(told.split()) for names, told in entries for name in names.split(", ")}


def options(command: str) -> str:
    """Each argument and option of a command of the command line."""
    import typer

    from repfx.commands import app

    group: Any = typer.main.get_command(app)
    rows = [(f"`{_spelled(each)}`", _default(each), each.help) for each in group.commands[command].params]
    return _table(("option", "default", "what it is"), rows)


def latency() -> str:
    """The committed results of `benchmarks/latency.py`: for each machine, the ratios of each form in each runtime."""
    parts = []
    for file in sorted(RESULTS.glob("latency-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        runtimes = list(dict.fromkeys(row["runtime"] for row in result["rows"]))
        cells: dict[tuple[str, str], list[str]] = {}
        for row in result["rows"]:
            ratio = f"{row['ratio']:.3f} ({row['low']:.3f}–{row['high']:.3f})"
            cells.setdefault((f"{row['model']}, `{row['spec']}`", row["form"]), []).append(ratio)
        setting = f"{result['hardware']}; input {result['input']}; torch {result['torch']}, onnxruntime {result['onnxruntime']}"
        parts += [f"{setting}:", _table(("model", "form", *runtimes), [(*key, *row) for key, row in cells.items()])]
    return "\n\n".join(parts)


def deployment() -> str:
    """The committed results of `benchmarks/deployment.py`: for each machine, the latency of each file of a model beside the fused one's."""
    parts = []
    for file in sorted(RESULTS.glob("deployment-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        forms = [form for form in dict.fromkeys(row["form"] for row in result["rows"]) if form != "fused"]
        cells: dict[str, dict[str, str]] = {}
        for row in result["rows"]:
            cells.setdefault(row["model"], {})[row["form"]] = _deployed(row)
        rows = [(model, *(found[form] for form in ("fused", *forms))) for model, found in cells.items()]
        tools = ", ".join(f"{name} {result[name]}" for name in ("torch", "timm", "onnxruntime", "onnxsim", "onnxslim"))
        parts += [f"{result['hardware']}; {tools}:", _table(("model", "fused", *forms), rows)]
    return "\n\n".join(parts)


def _deployed(row: dict[str, Any]) -> str:
    if "problem" in row:
        return str(row["problem"])
    convs = f"{row['convs']} → {row['convs_run']} convs"
    return convs if row["form"] == "fused" else f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f}), {convs}"


def compiled() -> str:
    """The committed results of `benchmarks/compiled.py`."""
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
        parts += [setting, _table(("with", "compiled step / eager step", "to compile", "graphs"), rows)]
    return "\n\n".join(parts)


def drift() -> str:
    """The committed result of `benchmarks/drift.py`: for each model, how far each way moves it."""
    result = json.loads((RESULTS / "drift.json").read_text(encoding="utf-8"))
    head = ("model", "way", "eval output, at once", "in training mode, at once", "eval output, after five passes")
    rows = [
        (row["model"], row["way"], *(f"{row[key]:.1e}" if row[key] else "0" for key in ("eval", "train", "drift")))
        for row in result["rows"]
    ]
    setting = f"γ at first {result['gamma']}; input {result['input']}; torch {result['torch']}"
    return f"{_table(head, rows)}\n\nRelative to the largest output; {setting}."


def observation() -> str:
    """The committed results of `benchmarks/observation.py`."""
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
        parts += [setting, _table(("form", "saliency", "step", "with observation / without"), rows)]
    return "\n\n".join(parts)


def scoring() -> str:
    """The committed results of `benchmarks/scoring.py`, in the form of IRepNAS, table 1."""
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
        parts += [setting, _table(("model", "form", *map(str, sizes)), [(*key, *row) for key, row in cells.items()])]
    return "\n\n".join(parts)


def search() -> str:
    """The committed result of `benchmarks/search.py`: what each search found, seed by seed."""
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
        "error of the fused net, relative to the variance of what it has to give out",
    )
    return (
        f"{_table(head, rows)}\n\n{result['epochs']} epochs of search and as many afterwards; kinds: {result['kinds']}."
    )


def gates() -> str:
    """The committed results of `benchmarks/gates.py`."""
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
        head = ("budget", "step / plain step", "memory / plain", "share of the branches' whole time", "and memory")
        parts += [f"{result['hardware']}; input {result['input']}; torch {result['torch']}:", _table(head, rows)]
    return "\n\n".join(parts)


def training() -> str:
    """The committed results of `benchmarks/training.py`."""
    parts = []
    for file in sorted(RESULTS.glob("training-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            (
                row["net"],
                row["candidate"],
                f"{row['step']:.3g} s",
                f"{row['step_ratio']:.2f}",
                f"{row['memory'] / 2**20:.0f} MiB",
                f"{row['memory_ratio']:.2f}",
                row["against"],
                f"{row['step_to_textbook']:.2f}",
            )
            for row in result["rows"]
        ]
        head = ("net", "with", "step", "ratio", "memory", "ratio", "ratios to", "step / textbook DBB")
        parts += [f"{result['hardware']}; input {result['input']}; torch {result['torch']}:", _table(head, rows)]
    return "\n\n".join(parts)


def transforms() -> str:
    """The committed results of `benchmarks/transforms.py`, a table for each question."""
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
    head = ("per conv", *(f"of {size:,} convs" for size in sizes), f"{sizes[-1]:,} to {sizes[0]}, collector off")
    return _table(head, [(f"`{name}`", *row) for name, row in cells.items()])


def _memory(rows: list[dict[str, Any]]) -> str:
    head = ("`fuse` of", "with", "the model", "fused", "layer in float64", "peak", "(peak − model) / layer")
    sizes = ("copy", "fused", "layer", "peak")
    return _table(
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
    return _table(
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
    """The committed result of `benchmarks/quantization.py`: what each rounding costs each form, and the ranges that it meets."""
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
        "other class",
        "accuracy, in points",
        "lowest SQNR of a conv's outputs, dB",
    )
    setting = (
        f"{result['images']} images of {result['data']}, {result['input']}, {result['epochs']} epochs; "
        f"{result['rows'][0]['images']} test images, "
        f"{result['calibration']} for calibration; torch {result['torch']}, onnxruntime {result['onnxruntime']}. Seed by seed."
    )
    ranges_head = ("branches", "largest weight of a conv", "times the median channel's", "largest output of a conv")
    return f"{_table(head, cost)}\n\n{setting}\n\n{_table(ranges_head, ranges)}\n\nMedians over the convs, means over the seeds."


def _spelled(parameter: Any) -> str:
    return str(parameter.name).upper() if parameter.param_type_name == "argument" else str(parameter.opts[0])


def _default(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    return "" if parameter.default in (None, False) else f"`{parameter.default}`"


TABLES: dict[str, Callable[[], str]] = {
    "presets": presets,
    "branches": branches,
    "passes": passes,
    "schedules": schedules,
    "recipes": recipes,
    "recipe_keys": recipe_keys,
    "latency": latency,
    "deployment": deployment,
    "compiled": compiled,
    "drift": drift,
    "observation": observation,
    "scoring": scoring,
    "search": search,
    "gates": gates,
    "training": training,
    **{f"options_of_{command}": partial(options, command) for command in ("train", "fuse", "inspect", "report")},
    "quantization": quantization,
    "transforms": transforms,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put each table where a page asks for it (called by MkDocs for every page)."""
    return MARK.sub(lambda mark: TABLES[mark[1]](), markdown)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _file_of(cls: type) -> str:
    return cls.__module__.replace(".", "/") + ".py"

"""The page `docs/zoo.md`, written from the record of `benchmarks/zoo.py`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

Row = dict[str, Any]
LIBRARIES = ("torchvision", "timm")
OTHERS = ("transformers", "segmentation_models_pytorch", "monai", "torchaudio", "ultralytics")
PRESETS = ("dbb", "repvgg")
EXACT = 1e-9
STRUCTURE = "structure only"
LOADS = "loads"
NOTHING_FOLDED = "has absorbed a BatchNorm"

INTRODUCTION = """\
# The zoo

<!-- written by `python -m benchmarks.zoo`; change that instead -->

The zoo has every model of torchvision that isn't quantized. Of timm, it has the smallest model of each module, and of each family with
blocks to re-parameterize. Each model is traced, fused, expanded by two presets and fused again. None of the models was prepared for this.

- All errors except those of ONNX are relative errors in **float64**. The weights are random, and the BatchNorms have the statistics of
  their input. γ and β are changed at random before an expanded model is fused.
- **Both modes**: the traced and the expanded model are compared with the original in eval mode, and, with the same seed, in training mode.
- Detectors are compared by all of their detections, at a score threshold of 0.
- Models of more than {limit} million parameters are examined without numbers (*structure only*), except `{anyway}`.
- *Convs / BatchNorms left* counts the modules after `repfx.fuse`, after `timm.utils.reparameterize_model`, and after torch's
  `torch.fx.experimental.optimization.fuse`. If one of the other two fails, the cell names its exception. **Bold** marks one of their
  outputs that is wrong.
- *Unchanged*: after all this, the model has the same modules, attributes and tensors as before, and nothing was written into them.
- *Equal* also requires *unchanged*, and that the fused expanded model has as many convs and BatchNorms as the fused plain model.

"""

OTHER_LIBRARIES = """\
## Other libraries

Nets of five more libraries, small ones where their options allow it, with random weights: classifiers and speech models of
transformers, the decoders of segmentation_models_pytorch with three encoders each, nets of monai for volumes and signals,
torchaudio's, and detectors, segmenters and pose models of ultralytics. `benchmarks/_zoo_libraries.py` says how each is built, and
what it takes. They are compared in eval mode. *Restored*: whether the weights of `restore(fuse(model))` load strictly into the
model's own class, which then must compute the same.

"""


def page(record: dict[str, Any], others: dict[str, Any] | None = None) -> str:
    """Write the whole page.

    Args:
        record: the rows of torchvision and timm.
        others: those of other libraries.
    """
    rows: list[Row] = record["rows"]
    more: list[Row] = [] if others is None else others["rows"]
    limit = record["structure_only_above"] / 1e6
    anyway = [_short(row["name"]) for row in rows if row.get("parameters", 0) > limit and row["input"] != STRUCTURE]
    versions = ", ".join(f"{name} {record[name]}" for name in ("torch", "torchvision", "timm", "onnxruntime", "python"))
    parts = [INTRODUCTION.format(limit=round(limit), anyway=", ".join(anyway))]
    if len(rows) < record["listed"]:
        parts.append(f"**Not finished: {len(rows)} of {record['listed']} models have been examined.**\n\n")
    parts += [
        f"Models are examined one by one. The latest were examined with {versions}, on {record['hardware']}.\n\n",
        "## Totals\n\n",
        _totals(rows, LIBRARIES),
        _beside(rows),
    ]
    parts += [f"## {library}\n\n{_models(of(rows, library))}" for library in LIBRARIES]
    parts += [] if others is None else _others(others)
    parts += ["## What is missed, and why\n\n", _misses(rows + more)]
    return "".join(parts)


def _others(record: dict[str, Any]) -> Iterator[str]:
    """Write the section of the other libraries."""
    rows: list[Row] = record["rows"]
    yield OTHER_LIBRARIES
    if len(rows) < record["listed"]:
        yield f"**Not finished: {len(rows)} of {record['listed']} nets have been examined.**\n\n"
    versions = ", ".join(
        f"{name} {record[name]}" for name in ("torch", *OTHERS, "onnxruntime", "python") if name in record
    )
    yield f"Made with {versions}, on {record['hardware']}.\n\n"
    yield _totals(rows, OTHERS)
    for library in OTHERS:
        yield f"### {library}\n\n{_nets(of(rows, library))}"


def of(rows: Iterable[Row], library: str) -> list[Row]:
    """Return the rows of one library."""
    return [row for row in rows if row["name"].startswith(f"{library}/")]


def _totals(rows: list[Row], libraries: tuple[str, ...]) -> str:
    counts: list[tuple[str, Callable[[list[Row]], str]]] = [
        ("models", lambda rows: str(len(rows))),
        ("equal, unchanged, no exception", lambda rows: str(sum(not row["problem"] for row in rows))),
        ("… of these by structure only", lambda rows: str(sum(row["input"] == STRUCTURE for row in rows))),
        ("… without convs", lambda rows: str(sum(not row["convs"] for row in rows))),
        ("convs", lambda rows: _sum(rows, "convs")),
        ("… reached", lambda rows: _share(sum(row["reached"] for row in rows), sum(row["convs"] for row in rows))),
        *(
            (f"… expanded by `{preset}`", lambda rows, preset=preset: str(sum(r["sites"].get(preset, 0) for r in rows)))
            for preset in PRESETS
        ),
        ("BatchNorms", lambda rows: _sum(rows, "batch_norms")),
        ("… left by fuse", lambda rows: str(sum(row["fused"][1] for row in rows if row["fused"]))),
        ("worst error", lambda rows: _power(max((_worst(row) for row in rows), default=0.0))),
        ("worst error of tracing and expanding, both modes", lambda rows: _power(max(_unrounded(rows), default=0.0))),
        (
            "ONNX: exported, and equal in onnxruntime",
            lambda rows: str(sum(isinstance(row["onnx"], float) for row in rows)),
        ),
    ]
    if libraries == OTHERS:
        counts += [("restored weights load strictly", lambda rows: str(sum(row["restored"] == LOADS for row in rows)))]
    lines = [(name, *(count(of(rows, library)) for library in libraries)) for name, count in counts]
    return _table(("", *libraries), lines)


def _beside(rows: list[Row]) -> str:
    """Write the table of what other libraries' fusing leaves of the same models."""
    lines = []
    for library, name in (("timm", "`timm.utils.reparameterize_model`"), ("torch", "torch's `fuse`")):
        seen = [row for row in rows if row[library]]
        both = [row for row in seen if not isinstance(row[library], str)]
        wrong = [row for row in both if not row["errors"].get(library, 0) <= EXACT]
        lines.append(
            (
                name,
                str(len(seen)),
                str(len(seen) - len(both)),
                str(len(wrong)),
                f"{sum(row[library][0] for row in both)} / {sum(row[library][1] for row in both)}",
                f"{sum(row['fused'][0] for row in both)} / {sum(row['fused'][1] for row in both)}",
            )
        )
    head = ("", "models", "exceptions", "wrong outputs", "convs / BatchNorms it leaves", "repfx on those models")
    return f"Other ways to fuse, on the models whose outputs were compared:\n\n{_table(head, lines)}"


Column = tuple[str, Callable[[Row], str]]


def _sizes(digits: int) -> list[Column]:
    """Return the columns of all tables; millions of parameters have so many digits behind the point."""
    sites: list[Column] = [(f"`{preset}` sites", partial(_sites, preset)) for preset in PRESETS]
    return [
        ("model", lambda row: _short(row["name"])),
        ("parameters, millions", lambda row: f"{row['parameters']:.{digits}f}"),
        ("input", lambda row: row["input"]),
        ("convs / BatchNorms", lambda row: f"{row['convs']} / {row['batch_norms']}"),
        ("reached", lambda row: str(row["reached"])),
        *sites,
        ("left by repfx", lambda row: _left(row, "fused")),
    ]


_ERROR: Column = ("worst error", lambda row: _power(_worst(row)) if row["errors"] else "")
_ONNX: Column = ("ONNX", lambda row: _onnx(row["onnx"]))
_RESULT: Column = ("", lambda row: row["problem"] or ("equal" if row["convs"] else "no convs"))


def _models(rows: list[Row]) -> str:
    others: list[Column] = [("by timm", lambda row: _left(row, "timm")), ("by torch", lambda row: _left(row, "torch"))]
    seconds: Column = ("fuse, s", lambda row: f"{row['seconds']['fuse']:.1f}" if "fuse" in row["seconds"] else "")
    return _by_row(rows, [*_sizes(1), *others, _ERROR, _ONNX, seconds, _RESULT])


def _nets(rows: list[Row]) -> str:
    restored: Column = ("restored", lambda row: _restored(row["restored"]))
    return _by_row(rows, [*_sizes(2), _ERROR, _ONNX, restored, _RESULT])


def _by_row(rows: list[Row], columns: list[Column]) -> str:
    return _table(tuple(head for head, _ in columns), [tuple(cell(row) for _, cell in columns) for row in rows])


def _sites(preset: str, row: Row) -> str:
    return str(row["sites"].get(preset, ""))


def _restored(found: str) -> str:
    if NOTHING_FOLDED in found:
        return "no BatchNorm"
    return found if found in ("", LOADS) else "other keys"


def _left(row: Row, library: str) -> str:
    found = row[library]
    if isinstance(found, str):
        return found
    text = f"{found[0]} / {found[1]}"
    return text if row["errors"].get(library, 0) <= EXACT else f"**{text}**"


def _onnx(found: float | str) -> str:
    if isinstance(found, float):
        return _power(found)
    backbone = re.search(r"Its backbone: (\S+)", found)
    return f"refused; backbone {backbone[1]}" if backbone else ("refused" if found else "")


def _misses(rows: list[Row]) -> str:
    parts = []
    wrong = [row for row in rows if row["problem"]]
    parts += ["### Models with a problem\n\n", _lists({row["name"]: {row["problem"]: 1} for row in wrong})]
    missed = {row["name"]: dict(Counter(row["missed"].values())) for row in rows if row["missed"]}
    parts += ["### Convs that aren't reached\n\n", _lists(missed)]
    stays = {row["name"]: _grouped(row["norms_that_stay"]) for row in rows if row["norms_that_stay"]}
    parts += ["### BatchNorms that stay\n\n", _lists(stays)]
    untraced: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for path, reason in row["untraced"].items():
            untraced[row["name"]][reason].append(path or "the model")
    code = {name: {f"{reason}: {_few(paths)}": 1 for reason, paths in each.items()} for name, each in untraced.items()}
    parts += ["### Code that can't be traced, around parts that can\n\n", _lists(code)]
    for preset in PRESETS:
        refused = {row["name"]: _grouped(row["refused"].get(preset, {})) for row in rows if row["refused"].get(preset)}
        parts += [f"### Convs that `{preset}` leaves as they are\n\n", _by_reason(refused)]
    keys = {row["name"]: {row["restored"]: 1} for row in rows if _restored(row.get("restored", "")) == "other keys"}
    if keys:
        parts += ["### Restored weights that don't load strictly\n\n", _lists(keys)]
    files = {row["name"]: {row["onnx"]: 1} for row in rows if isinstance(row["onnx"], str) and row["onnx"]}
    parts += ["### Models that can't be exported to ONNX\n\n", _lists(files)]
    return "".join(parts)


def _grouped(reasons: dict[str, int]) -> dict[str, int]:
    """Add up the counts of reasons that differ only in names of nodes, which differ from call to call."""
    grouped: Counter[str] = Counter()
    for reason, count in reasons.items():
        grouped[re.sub(r"'\w+'", "'…'", reason)] += count
    return dict(grouped.most_common())


def _by_reason(refused: dict[str, dict[str, int]]) -> str:
    counts: Counter[str] = Counter()
    models: dict[str, list[str]] = defaultdict(list)
    for name, reasons in refused.items():
        for reason, count in reasons.items():
            counts[reason] += count
            models[reason].append(_short(name))
    lines = [(reason, str(count), _few(models[reason])) for reason, count in counts.most_common()]
    return _table(("reason", "convs", "models"), lines) if lines else "None.\n\n"


def _lists(found: dict[str, dict[str, int]]) -> str:
    lines = []
    for name, reasons in found.items():
        texts = [f"{_plain(reason)}{f' ({count}×)' if count > 1 else ''}" for reason, count in reasons.items()]
        lines.append(f"- **{_short(name)}**: {'; '.join(texts)}\n")
    return "".join(lines) + "\n" if lines else "None.\n\n"


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _worst(row: Row) -> float:
    own = [value for key, value in row["errors"].items() if key not in ("timm", "torch")]
    return max(own, default=0.0)


def _unrounded(rows: list[Row]) -> list[float]:
    return [value for row in rows for key, value in row["errors"].items() if "traced" in key or "expanded" in key]


def _sum(rows: list[Row], key: str) -> str:
    return str(sum(row[key] for row in rows))


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})" if whole else "0"


def _power(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def _short(name: str) -> str:
    return name.partition("/")[2]


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    written = [" | ".join(line) for line in (head, ("---",) * len(head), *lines)]
    return "".join(f"| {line} |\n" for line in written) + "\n"

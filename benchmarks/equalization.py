"""Even out the layers of the zoo's classifiers, and compare outputs and ranges before and after.

    python -m benchmarks.equalization                      classifiers that the record lacks
    python -m benchmarks.equalization --again 'timm/*'     these once more

Each model has random weights and the BatchNorm statistics of its input, as in the zoo. It is fused, then equalized, in float64.
`range_ratios` says how uneven the layers are that factors reached.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import nn

import repfx
from benchmarks._record import Row, machine, write
from benchmarks._zoo_model import STRUCTURE_ONLY, Findings, build, error, fitting_inputs, outputs, settle
from benchmarks.zoo import MODELS
from repfx.errors import InvalidInput, first_line
from repfx.passes.equalize import equalize, range_ratios
from repfx.testing import randomize_batch_norm

OUT = Path(__file__).parent / "results" / "equalization.json"
SMOKE = ("torchvision/resnet18", "torchvision/squeezenet1_0")
NO_CLASSIFIERS = (".detection.", ".segmentation.", ".optical_flow.")


def measure(name: str) -> Row:
    """Return one model's row. It is empty, but for the name and a reason, where no factor passes."""
    torch.manual_seed(0)
    model = build(name)
    size = sum(parameter.numel() for parameter in model.parameters())
    if any(part in type(model).__module__ for part in NO_CLASSIFIERS) or size > STRUCTURE_ONLY:
        return {"name": name, "left_out": "no classifier" if size <= STRUCTURE_ONLY else "too large"}
    model = randomize_batch_norm(model.double())
    inputs = fitting_inputs(model, Findings(name))
    settle(model, inputs)
    fused = repfx.fuse(model)
    try:
        even = equalize(fused)
    except InvalidInput as refused:
        return {"name": name, "stays": first_line(refused)}
    before, after = dict(range_ratios(fused)), dict(range_ratios(even))
    touched = [path for path in before if not _same(fused, even, path)]
    if not touched:
        return {"name": name, "stays": "no factor narrows a range"}
    return {
        "name": name,
        "error": error(outputs(even, inputs), outputs(fused, inputs)),
        "layers": len(before),
        "touched": len(touched),
        "worst_before": round(max(before[path] for path in touched), 3),
        "worst_after": round(max(after[path] for path in touched), 3),
        "median_before": round(median(before[path] for path in touched), 3),
        "median_after": round(median(after[path] for path in touched), 3),
    }


def _same(model: nn.Module, other: nn.Module, path: str) -> bool:
    return torch.equal(*(each.get_submodule(path).get_parameter("weight") for each in (model, other)))


def _is_wrong(row: Row) -> bool:
    return "error" in row and not (
        float(row["error"]) <= 1e-9 and float(row["worst_after"]) < float(row["worst_before"])
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", default="", help="pattern of names to measure again though the record has them")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--smoke", action="store_true", help="two models, nothing written")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out: Path = arguments.out
    rows: dict[str, Row] = {}
    if out.is_file() and not arguments.smoke:
        rows = {row["name"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    for name in SMOKE if arguments.smoke else MODELS.read_text(encoding="utf-8").split():
        if name in rows and not fnmatch(name, arguments.again):
            continue
        rows[name] = measure(name)
        gc.collect()
        print(json.dumps(rows[name]), flush=True)
        if not arguments.smoke:
            write(out, {**machine("cpu"), "timm": version("timm")}, [rows[each] for each in sorted(rows)])
    wrong = [str(row["name"]) for row in rows.values() if _is_wrong(row)]
    if wrong:
        sys.exit(f"the outputs moved, or the worst range isn't narrower: {', '.join(wrong)}")


if __name__ == "__main__":
    main()

"""The table of the gallery's runs, written from `docs/gallery/records.json`."""

from __future__ import annotations

import json
from pathlib import Path

from docs.hooks.measurements import table

RECORDS = Path(__file__).parents[1] / "gallery" / "records.json"


def gallery() -> str:
    """Write what each run of the gallery became: branches, parameters, accuracy and cost."""
    rows = [
        (
            f"`{name}`",
            str(run["branches"]),
            f"{run['parameters']['expanded']:,} → {run['parameters']['fused']:,}",
            f"{run['accuracy']['fused']:.1%}",
            f"{run['flips']} of {run['test_images']}",
            f"{run['training_macs'] / run['plain_macs']:.2f}",
        )
        for name, run in json.loads(RECORDS.read_text(encoding="utf-8")).items()
    ]
    head = ("run", "branches", "parameters", "accuracy, fused", "flips in onnxruntime", "cost")
    return table(head, rows)

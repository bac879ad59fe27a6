"""Run the gallery's commands, write their records, and renew the pictures of reports in `docs/images`.

    python -m docs.gallery.make runs

A run that the folder holds already is kept. The pictures need Chromium.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from docs.hooks.gallery import RECORDS
from repfx.commands.app import run_app
from repfx.pages.changes import structure_after
from repfx.pages.comparison_page import write_comparison_page
from repfx.pages.run_page import write_run_page
from repfx.training.run_folder import RunFolder

DOCS = Path(__file__).parents[1]
IMAGES = DOCS / "images"
WIDTH, SHARPNESS, COLOURS = 760, 2, 256
_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def main(folder: Path) -> None:
    """Make all runs, records and pictures; the runs stay in `folder`."""
    runs, records = {}, {}
    for line in re.findall(r"^repfx train .*$", (DOCS / "gallery.md").read_text(encoding="utf-8"), re.MULTILINE):
        words = shlex.split(line)[1:]
        words[-1] = str(folder / Path(words[-1]).name)  # the last option is --out
        if not (Path(words[-1]) / "metrics.json").exists():
            run_app([*words, "--overwrite"])
        run = RunFolder(Path(words[-1]))
        runs[run.path.name], records[run.path.name] = run, {"command": line, **record(run)}
    RECORDS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    for name, run in runs.items():
        page = write_run_page(run, folder / f"{name}.html", trust=True)
        if 'id="structure"' in page.read_text(encoding="utf-8"):
            picture(page, "structure", f"gallery-{name}", without="h2, .tiles, .note, .legend")
    picture(folder / "dyrep.html", "training", "report")
    picture(folder / "dyrep.html", "structure", "report-dark", dark=True, unfolded=2)
    compared = [run.path for name, run in runs.items() if name in ("dbb", "dyrep", "repan")]
    picture(write_comparison_page(compared, folder / "comparison.html"), "training", "report-comparison")


def record(run: RunFolder) -> dict[str, Any]:
    """Return what the gallery's table shows of a run, as plain values."""
    metrics, history = run.metrics, run.history
    if metrics is None or history is None:
        raise SystemExit(f"{run.path} isn't finished: remove it, or resume it")
    before, *trained = history.epochs
    return {
        "accuracy": metrics["accuracy"],
        "flips": metrics["flips"]["onnxruntime"],
        "test_images": metrics["test_images"],
        "max_error": metrics["max_error"],
        "parameters": {form: cost["parameters"] for form, cost in metrics["cost"].items()},
        "branches": sum(map(len, structure_after(trained[-1]).values())),
        "training_macs": sum(epoch.macs for epoch in trained),
        "plain_macs": before.macs * len(trained),
    }


def picture(page: Path, section: str, name: str, *, dark: bool = False, unfolded: int = 0, without: str = "h3") -> None:
    """Draw one section of a page as `docs/images/NAME.png`, cut to what is drawn.

    Args:
        unfolded: how many of its details are unfolded.
        without: a selector of what is left out, besides what comes after a heading inside the section.
    """
    left_out = f"header, footer, section:not(#{section}), #{section} :is({without}, h3, h3 ~ *)"
    shown = f"<style>{left_out} {{ display: none }}</style>"
    before, text = page.read_text(encoding="utf-8").replace("<details open", "<details").split(f'id="{section}"')
    text = f'{before}id="{section}"' + text.replace("<details", "<details open", unfolded)
    with tempfile.TemporaryDirectory() as scratch:
        alone, drawn = Path(scratch) / "page.html", Path(scratch) / "page.png"
        alone.write_text(text.replace("</head>", f"{shown}</head>"), encoding="utf-8")
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={scratch}/profile",
        ]
        options += [
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--force-device-scale-factor={SHARPNESS}",
        ]
        options += [f"--window-size={WIDTH},2000", f"--screenshot={drawn}", alone.as_uri()]
        subprocess.run([str(_CHROMIUM), *options], check=True, capture_output=True)
        image = Image.open(drawn).convert("RGB")
    around = Image.new("RGB", image.size, image.getpixel((0, 0)))
    cut = image.crop(ImageChops.difference(image, around).getbbox())
    cut.quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(IMAGES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

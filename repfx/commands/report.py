"""`repfx report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repfx.commands.app import command
from repfx.commands.arguments import Trust
from repfx.commands.output import Json, print_json
from repfx.commands.progress import busy
from repfx.pages.comparison_page import write_comparison_page
from repfx.pages.run_page import write_run_page
from repfx.training.run_folder import RunFolder


@command("report")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="The folder of a training run, finished or not; or the folders of up to 12 runs to compare.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file to write.",
            show_default="report.html in the run's folder, or comparison.html in the current folder",
        ),
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Write one HTML page about a training run: curves, structure, costs, and the model before and after fusing.

    Of several runs, the page compares curves, costs, recipes and structures.
    """
    if len(runs) == 1:
        with busy("fusing, comparing and drawing"):
            page = write_run_page(RunFolder(runs[0]), out, trust=trust)
    else:
        with busy("comparing and drawing"):
            page = write_comparison_page(runs, out)
    if as_json:
        print_json({"page": str(page)})
    else:
        typer.echo(f"The page is {page}.")

"""`repfx report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repfx.commands.app import command
from repfx.commands.arguments import Trust
from repfx.commands.output import Json, print_json
from repfx.commands.progress import busy
from repfx.errors import InvalidInput
from repfx.pages.comparison_page import write_comparison_page
from repfx.pages.run_page import write_run_page
from repfx.pages.sweep_page import write_sweep_page
from repfx.training.run_folder import RunFolder
from repfx.training.sweep import SWEEP


@command("report")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="The folder of a training run, finished or not; the folders of up to 12 runs to compare; or the folder of a sweep.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file to write.",
            show_default="report.html in the folder, or comparison.html in the current folder",
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(help="Folder that also gets the pictures of a run's page, as SVG files.", show_default="none"),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Image file for which the page of a run shows maps of features.", show_default="no maps"),
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Write one HTML page about a training run: curves, structure, costs, and the model before and after fusing.

    Of several runs, the page compares curves, costs, recipes and structures. Of a sweep, it shows accuracy over the options and the cost.
    """
    is_sweep = (runs[0] / SWEEP).is_file()
    if (len(runs) > 1 or is_sweep) and (pictures is not None or image is not None):
        raise InvalidInput("--pictures and --image are for the page of one run: leave them out.")
    if len(runs) == 1 and is_sweep:
        with busy("comparing and drawing"):
            page = write_sweep_page(runs[0], out)
    elif len(runs) == 1:
        with busy("fusing, comparing and drawing"):
            page = write_run_page(RunFolder(runs[0]), out, trust=trust, image=image, pictures=pictures)
    else:
        with busy("comparing and drawing"):
            page = write_comparison_page(runs, out)
    if as_json:
        print_json({"page": str(page)})
    else:
        typer.echo(f"The page is {page}.")

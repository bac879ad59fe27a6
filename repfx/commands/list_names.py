"""`repfx list`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from repfx.blocks.branch import KINDS
from repfx.blocks.presets import PRESETS
from repfx.change.schedule import SCHEDULES
from repfx.commands.app import command
from repfx.commands.arguments import Json, print_json
from repfx.commands.tables import listing, terminal_width
from repfx.rewriting.rule import PASSES
from repfx.training.recipe_file import description_of, known_recipes


class Registry(str, Enum):
    """The kinds of names that can be listed."""

    branches = "branches"
    presets = "presets"
    passes = "passes"
    schedules = "schedules"
    recipes = "recipes"


@command("list", short="List branch kinds, presets, passes, schedules and recipes.")
def list_names(
    what: Annotated[Registry, typer.Argument(help="The kind of names to list.", show_default=False)],
    as_json: Json = False,
) -> None:
    """List the branch kinds, presets, passes, schedules or recipes, with one line about each."""
    rows = {
        Registry.branches: [(kind, _first_line(branch)) for kind, branch in KINDS.items()],
        Registry.presets: [(preset.name, preset.description) for preset in PRESETS.values()],
        Registry.passes: [(found.name, found.description) for found in PASSES.values()],
        Registry.schedules: [(name, _first_line(found)) for name, found in SCHEDULES.items()],
        Registry.recipes: [(name, description_of(path)) for name, path in known_recipes().items()],
    }[what]
    if as_json:
        print_json([{"name": name, "description": description} for name, description in rows])
    else:
        typer.echo(listing(rows, terminal_width()))


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").splitlines()[0].replace("``", "`")

"""`repfx list`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from repfx.commands.app import command
from repfx.commands.output import Json, listing, print_json, terminal_width


class Registry(str, Enum):
    """The kinds of names that can be listed."""

    branches = "branches"
    presets = "presets"
    passes = "passes"
    schedules = "schedules"
    recipes = "recipes"


@command("list")
def list_names(
    what: Annotated[Registry, typer.Argument(help="The kind of names to list.", show_default=False)],
    as_json: Json = False,
) -> None:
    """List the branch kinds, presets, passes, schedules or recipes, with one line about each."""
    rows = _recipes() if what is Registry.recipes else _registered(what)
    if as_json:
        print_json([{"name": name, "description": description} for name, description in rows])
    else:
        typer.echo(listing(rows, terminal_width()))


def _recipes() -> list[tuple[str, str]]:
    from repfx.training.named_recipes import description_of, known_recipes

    return [(name, description_of(path)) for name, path in known_recipes().items()]


def _registered(what: Registry) -> list[tuple[str, str]]:
    """Return what code registers, which needs torch."""
    from repfx.blocks.branch import KINDS
    from repfx.blocks.presets import PRESETS
    from repfx.change.schedule import SCHEDULES
    from repfx.rewriting.rule import PASSES

    if what is Registry.presets:
        return [(preset.name, preset.description) for preset in PRESETS.values()]
    if what is Registry.passes:
        return [(found.name, found.description) for found in PASSES.values()]
    classes = KINDS if what is Registry.branches else SCHEDULES
    return [(name, (found.__doc__ or "").splitlines()[0].replace("``", "`")) for name, found in classes.items()]

"""`repfx recipe`."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from typing import Annotated, Any

import typer

from repfx.change.schedule import SCHEDULES
from repfx.commands.app import command
from repfx.commands.names import recipe_names
from repfx.commands.output import Json, print_json, terminal_width, with_wrapped_comments
from repfx.errors import InvalidInput
from repfx.records.plain_values import from_plain, schema_of
from repfx.training.experiment import OF_A_CALL, Experiment
from repfx.training.learning_rate import TIMM
from repfx.training.recipe import LEAST, OF_TIMM, choices
from repfx.training.recipe_file import parse_recipe, text_of

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Wanted(str, Enum):
    """What can be asked about recipes."""

    show = "show"
    schema = "schema"


@command("recipe")
def recipe(
    what: Annotated[
        Wanted,
        typer.Argument(
            help="show checks a recipe and prints it; schema writes the JSON Schema of recipes, for editors.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Argument(
            help="To be shown: a .toml file, or a name that `repfx list recipes` shows.",
            show_default=False,
            autocompletion=recipe_names,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check and print one recipe, or write the schema by which an editor completes recipes and marks mistakes."""
    if what is Wanted.schema:
        if name is not None:
            raise InvalidInput(f"there is one schema for all recipes: leave {name!r} out.")
        print_json(recipe_schema())
        return
    if name is None:
        raise InvalidInput(
            "repfx recipe show needs the name of a recipe, or a file: `repfx list recipes` lists the names."
        )
    values = parse_recipe(name)
    from_plain(Experiment, values)
    if as_json:
        print_json(values)
    else:
        typer.echo(with_wrapped_comments(text_of(name).rstrip(), terminal_width()))


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe's file, with the options of all schedules that are known."""
    found = schema_of(Experiment)
    keys = found["properties"]
    for name in OF_A_CALL:
        del keys[name]
    training = keys["training"]["properties"]
    for name, (_, known) in choices().items():
        of_timm = [{"type": "string", "pattern": f"^{TIMM}"}] if name in OF_TIMM else []
        training[name]["anyOf"] = [{"enum": sorted(known)}, *of_timm]
    for name, least in LEAST.items():
        training[name]["minimum"] = least
    keys["schedule"] = {"description": keys["schedule"]["description"], "anyOf": [*map(_schedule, SCHEDULES), _CODE]}
    return {"$schema": _DIALECT, "title": "A recipe of repfx", **found}


_CODE = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": ":", "description": "file.py:Class or package.module:Class"}},
    "required": ["name"],
}


def _schedule(name: str) -> dict[str, Any]:
    found = schema_of(SCHEDULES[name])
    named = {"name": {"const": name, "description": (SCHEDULES[name].__doc__ or "").splitlines()[0]}}
    options = {each.name: found["properties"][each.name] for each in fields(SCHEDULES[name])}
    return {**found, "properties": {**named, **options}, "required": ["name"]}

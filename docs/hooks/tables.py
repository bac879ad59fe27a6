"""Write the tables of registered names, of options and of measurements into the pages, where a reader of a checkout finds them, too.

    python -m docs.hooks.tables

A table stands between ``<!-- table: presets -->`` and ``<!-- end -->``, each on a line of its own. The docs' build calls this as a hook.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from docs.hooks.gallery import gallery
from docs.hooks.imagenet import imagenet
from docs.hooks.measurements import MEASUREMENTS, table

ROOT = Path(__file__).parents[2]
TABLE = re.compile(r"^<!-- table: (\w+) -->$.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)


def presets() -> str:
    """Each preset with the branches that it puts beside a site's own conv."""
    from repfx.blocks.presets import PRESETS
    from repfx.blocks.spec import Spec

    def branches(spec: Spec) -> str:
        if callable(spec.branches):
            return "depends on the window"
        return ", ".join(f"`{getattr(branch, 'kind', branch)}`" for branch in spec.branches)

    rows = [(f"`{preset.name}`", branches(preset.spec), preset.description) for preset in PRESETS.values()]
    return table(("preset", "branches beside the site's own conv", "what it is"), rows)


def branches() -> str:
    """Each branch kind with the first line of its class's docstring."""
    from repfx.blocks.branch import KINDS

    rows = [(f"`{kind}`", _first_line(cls), f"`{_file_of(cls)}`") for kind, cls in KINDS.items()]
    return table(("kind", "what it is", "file"), rows)


def passes() -> str:
    """Each pass: a verb on models, or a rule that `fuse` runs."""
    from repfx.rewriting.rule import PASSES, RULES

    rows = [(f"`{name}`", "rule" if name in RULES else "verb", each.description) for name, each in PASSES.items()]
    return table(("pass", "sort", "what it does"), sorted(rows, key=lambda row: row[1], reverse=True))


def schedules() -> str:
    """Each schedule with the first line of its class's docstring."""
    from repfx.change.schedule import SCHEDULES

    rows = [(f"`{name}`", _first_line(cls), f"`{_file_of(cls)}`") for name, cls in SCHEDULES.items()]
    return table(("schedule", "what it is", "file"), rows)


def recipes() -> str:
    """Each shipped recipe with its first line."""
    from repfx.training.named_recipes import description_of, shipped_recipes

    rows = [(f"`{name}`", description_of(path)) for name, path in shipped_recipes().items()]
    return table(("recipe", "what it is"), rows)


def recipe_keys() -> str:
    """Each key of a recipe's file with its default and what its dataclass says of it."""
    from repfx.training.experiment import Experiment

    elsewhere = ("out", "overwrite", "resume")  # where a run is stored is no part of its recipe
    rows = [row for row in _keys(Experiment) if row[0].strip("`") not in elsewhere]
    return table(("key", "default", "what it is"), rows)


def _keys(cls: Any, inside: str = "") -> Iterator[tuple[str, str, str]]:
    """Keys of a dataclass and of the dataclasses in its fields, joined by dots, each with its default and its description."""
    from repfx.records.plain_values import descriptions

    told, kinds = descriptions(cls), get_type_hints(cls)
    for field in fields(cls):
        inner = next((each for each in (kinds[field.name], *get_args(kinds[field.name])) if is_dataclass(each)), None)
        if inner is None:
            default = "" if field.default in (MISSING, None, "") else f"`{json.dumps(field.default, default=str)}`"
            yield f"`{inside}{field.name}`", default, told[field.name]
        else:
            yield from _keys(inner, f"{inside}{field.name}.")


def options(command: str) -> str:
    """Each argument and option of a command of the command line."""
    import typer

    from repfx.commands import app

    group: Any = typer.main.get_command(app)
    rows = [(f"`{_spelled(each)}`", _default(each), each.help) for each in group.commands[command].params]
    return table(("option", "default", "what it is"), rows)


def _spelled(parameter: Any) -> str:
    return str(parameter.name).upper() if parameter.param_type_name == "argument" else str(parameter.opts[0])


def _default(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    return "" if parameter.default in (None, False) else f"`{parameter.default}`"


TABLES: dict[str, Callable[[], str]] = {
    **MEASUREMENTS,
    "presets": presets,
    "branches": branches,
    "passes": passes,
    "schedules": schedules,
    "recipes": recipes,
    "recipe_keys": recipe_keys,
    "gallery": gallery,
    "imagenet": imagenet,
    **{
        f"options_of_{command}": partial(options, command)
        for command in ("train", "recipe", "fuse", "predict", "evaluate", "inspect", "profile", "report", "sweep")
    },
}


def with_tables(markdown: str) -> str:
    """Return a page with its tables as they are now."""
    return TABLE.sub(lambda found: f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->", markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write a page's tables anew, without the marks around them (called by MkDocs for every page)."""
    return TABLE.sub(lambda found: f"\n{TABLES[found[1]]()}\n", markdown)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _file_of(cls: type) -> str:
    return cls.__module__.replace(".", "/") + ".py"


def main() -> None:
    """Write the tables of all pages anew."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        before = page.read_text(encoding="utf-8")
        after = with_tables(before)
        if after != before:
            page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Recipes as TOML files: the user's own, or shipped with repfx."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repfx.data.load import prefix_of
from repfx.errors import InvalidInput, UnknownName, first_line
from repfx.records.json_text import require_shallow
from repfx.training.named_recipes import known_recipes
from repfx.training.trust import Trust, require_trusted

_PATHS = (
    "weights",
    "baseline",
    "spec",
    "data.name",
    "model.name",
    "schedule.name",
    "training.distillation.teacher.name",
    "training.distillation.weights",
)


def read_recipe(source: str | Path, *, trust: Trust = False) -> dict[str, Any]:
    """Return the values of a recipe, from a file or by the name of one that repfx or an installed package brings.

    Relative paths in a file, except `data.root`, start from the file's folder.

    Args:
        trust: whether all models and schedules that a file names may be called, or the names of those that may be. Without it, a file
            may name only models of torchvision, timm and `repfx.recipes.nets`, and classes of modules that are imported already.

    Raises:
        InvalidInput: the file is no TOML, or it names other code.
        UnknownName: no shipped recipe has this name.
        OSError: the file can't be read.
    """
    values = parse_recipe(source)
    if is_file(source):
        require_trusted(values, repr(str(source)), trust)
    return values


def is_file(source: str | Path) -> bool:
    """Whether a recipe is meant by its file, which anybody may have written, and not by the name of an installed one."""
    return Path(source).suffix == ".toml"


def parse_recipe(source: str | Path) -> dict[str, Any]:
    """Return the values of a recipe, as `read_recipe` does, whatever code it names."""
    path = _path_of(source)
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        values: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
        require_shallow(values)
    except RecursionError:
        raise InvalidInput(f"{str(path)!r} is no recipe: it is nested too deep.") from None
    except ValueError as error:
        raise InvalidInput(f"{str(path)!r} is no TOML: {first_line(error)}.") from error
    _start_from(path.parent, values, _PATHS)
    return values


def text_of(source: str | Path) -> str:
    """Return the text of a recipe's file."""
    return _path_of(source).read_text(encoding="utf-8")


def _path_of(source: str | Path) -> Path:
    if is_file(source):
        return Path(source)
    known = known_recipes()
    if str(source) not in known:
        raise UnknownName("recipe (a name, or a file that ends in .toml)", str(source), known)
    return known[str(source)]


def from_root(values: dict[str, Any]) -> dict[str, Any]:
    """Return recipe values after naming the files and folders in them by absolute paths, in place."""
    _start_from(Path.cwd(), values, (*_PATHS, "data.root"))
    return values


def to_toml(values: Mapping[str, Any]) -> str:
    """Return recipe values as the text of a TOML file.

    Raises:
        InvalidInput: a value has no form in TOML, or tomli-w is missing.
    """
    try:
        text: str = importlib.import_module("tomli_w").dumps(values)
    except ImportError as error:
        raise InvalidInput("writing a recipe needs tomli-w, which is missing: pip install 'repfx[train]'.") from error
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"the recipe can't be written as TOML: {first_line(error)}.") from error
    return text


def _start_from(folder: Path, values: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Prefix the paths under `keys` with a folder, in place, if they exist in it."""
    for key in keys:
        *outer, last = key.split(".")
        table: Any = values
        for name in outer:
            table = table.get(name) if isinstance(table, dict) else None
        value = table.get(last) if isinstance(table, dict) else None
        if (
            isinstance(value, str)
            and value not in ("", "digits", "plain")
            and (key != "spec" or value.endswith(".json"))
        ):
            path, separator, name = value.rpartition(":") if ".py:" in value else (value, "", "")
            begin = prefix_of(path)
            path = path.removeprefix(begin)
            if (folder / path).exists():
                table[last] = f"{begin}{folder / path}{separator}{name}"

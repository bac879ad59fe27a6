"""The recipes that have a name, shipped with repfx or brought by installed packages. To list them, nothing has to be imported."""

from __future__ import annotations

from pathlib import Path

from repfx.records.registry import load_entry_points

_SHIPPED = Path(__file__).parents[1] / "recipes"


def known_recipes() -> dict[str, Path]:
    """Return the files of all recipes that have a name: the shipped ones, and those of installed packages."""
    found = shipped_recipes()
    for package in load_entry_points("repfx.recipes").values():
        folders = map(Path, getattr(package, "__path__", ()))
        found |= {path.stem: path for folder in folders for path in sorted(folder.rglob("*.toml"))}
    return found


def shipped_recipes() -> dict[str, Path]:
    """Return the files of the shipped recipes, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.rglob("*.toml"), key=lambda path: path.stem)}


def description_of(path: Path) -> str:
    """Return the first line of the comment at the top of a recipe's file."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")

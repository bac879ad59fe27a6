"""`Registry`: things of one sort by name, with those that installed packages and plug-in files add.

A package adds branch kinds, passes, schedules or recipes by an entry point in one of the groups ``repfx.branches``, ``repfx.passes``,
``repfx.schedules`` and ``repfx.recipes``::

    [project.entry-points."repfx.branches"]
    shifted = "my_package.shifted"

The entry point names a module; importing it registers what it defines. In ``repfx.recipes`` it names a package that holds ``.toml`` files.
Entry points are loaded once a name is unknown or all names are asked for, so that `import repfx` imports nobody else's code.
What repfx itself registers lies in its own packages of the same names. It is registered before anything else.
"""

from __future__ import annotations

import importlib
import warnings
from collections import UserDict
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from repfx.errors import first_line

Value = TypeVar("Value")

_loaded: dict[str, dict[str, object]] = {}  # what entry points gave, by group


class Registry(UserDict[str, Value]):
    """Things of one sort by name; a dict that loads the entry points of its group before it says that a name is unknown.

    Args:
        group: the entry points' group, which may be a package of repfx, too.
        first: things that are registered at once.

    >>> colours = Registry[int]("my_package.colours")
    >>> colours["red"] = 1
    >>> "red" in colours, "blue" in colours, list(colours)
    (True, False, ['red'])
    """

    def __init__(self, group: str, first: Mapping[str, Value] | None = None) -> None:
        super().__init__()
        self.group = group
        self.data.update(first or {})

    def __setitem__(self, name: str, value: Value) -> None:
        _load_own(self.group)
        self.data[name] = value

    def __missing__(self, name: str) -> Value:
        load_entry_points(self.group)
        return self.data[name]

    def __contains__(self, name: object) -> bool:
        if name not in self.data:
            load_entry_points(self.group)
        return name in self.data

    def __iter__(self) -> Iterator[str]:
        load_entry_points(self.group)
        return iter(dict(self.data))

    def __len__(self) -> int:
        load_entry_points(self.group)
        return len(self.data)

    @property
    def known(self) -> dict[str, Value]:
        """The things registered by now, by name, without asking installed packages."""
        _load_own(self.group)
        return self.data


def _load_own(group: str) -> None:
    """Import the package of repfx that has the name of a group. While it is being imported, nothing happens."""
    if group.startswith("repfx."):
        importlib.import_module(group)


def load_entry_points(group: str) -> dict[str, object]:
    """Load the entry points of a group, each once in a process, and return what they name.

    One that can't be loaded is left out; a warning names it in one sentence.
    """
    _load_own(group)
    if group not in _loaded:
        _loaded[group] = {}  # first, because what is being loaded may ask for names itself
        for point in entry_points(group=group):
            try:
                _loaded[group][point.name] = point.load()
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # such as SystemExit
                warnings.warn(_broken(point, error), stacklevel=2)
    return _loaded[group]


def _broken(point: EntryPoint, error: BaseException) -> str:
    package = "an installed package" if point.dist is None else f"package {point.dist.name!r}"
    reason = f"{type(error).__name__}: {first_line(error)}"
    return f"repfx leaves out the plug-in {point.name!r} of {package} ({point.group}), which can't be loaded: {reason}."

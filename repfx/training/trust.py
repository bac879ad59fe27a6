"""Trust: which calls a file may cause. A run folder and a recipe name models and schedules, and a name is a call of code.

A file may name models of torchvision and timm and the nets of `repfx.recipes.nets`. It may name classes of modules that this process has
imported already, if they are subclasses of `nn.Module` or `Schedule`. Whatever else it names is called only if the user has named it, too,
or trusts the file. To find out what a name stands for, nothing is imported.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from repfx.change.schedule import Schedule
from repfx.errors import InvalidInput
from repfx.records.python_code import import_source, imported_already

Trust: TypeAlias = bool | Collection[str]
"""True trusts all that a file names, False nothing, and a collection the names in it."""

OWN_NETS = "repfx.recipes.nets"
_LIBRARIES = ("torchvision", "timm")
_READS_FILES = {
    "checkpoint_path",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
}  # options of timm's, whose older versions unpickle a file
_LONGEST = 300


@dataclass(frozen=True)
class Call:
    """A call that a file asks for.

    Args:
        name: what is called, such as `file.py:callable`.
        options: its keyword arguments.
        base: the class that it makes an instance of.
    """

    name: str
    options: Mapping[str, Any]
    base: type

    @property
    def is_of_a_library(self) -> bool:
        """Whether the name is that of a library's model or of a registered schedule."""
        source, _, name = self.name.rpartition(":")
        if source == OWN_NETS:
            return getattr(vars(import_source(OWN_NETS)).get(name), "__module__", OWN_NETS) == OWN_NETS
        return not source or (source in _LIBRARIES and not any(map(self.options.get, _READS_FILES)))

    @property
    def is_harmless(self) -> bool:
        """Whether a library provides what is called, or a class of a module that is imported already."""
        if self.is_of_a_library:
            return True
        source, _, name = self.name.rpartition(":")
        found = vars(imported_already(source) or nn.Module()).get(name)
        return isinstance(found, type) and issubclass(found, self.base)

    def __str__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"{self.name!r} with " + (shown[:_LONGEST] + "…" * (len(shown) > _LONGEST) or "no arguments")


def require_trusted(values: Mapping[str, Any], where: str, trust: Trust, advice: str = "") -> None:
    """Raise unless all that the values of a recipe or a run folder would have called may be called.

    Args:
        where: the file that the values come from, for the message.
        advice: what else the user can do, for the message.

    Raises:
        InvalidInput: the values name other code; the message shows what would be called.
    """
    for call in calls_in(values):
        if trust is True or call.is_harmless or (trust is not False and call.name in trust):
            continue
        raise InvalidInput(
            f"{where} would call {call}, and by itself a file may name only models of torchvision, timm and {OWN_NETS}: "
            f"if that call is what you want, allow it with --trust (in Python, trust=True){advice}."
        )


def calls_in(values: Mapping[str, Any]) -> Iterator[Call]:
    """Yield all calls that the values of a recipe ask for."""
    model, schedule = _table(values, "model"), _table(values, "schedule")
    teacher = _table(_table(_table(values, "training"), "distillation"), "teacher")
    for reference in (model, teacher):
        if isinstance(reference.get("name"), str):
            classes = reference.get("num_classes")
            known = {} if classes is None else {"num_classes": classes}
            yield Call(reference["name"], {**known, **_table(reference, "options")}, nn.Module)
    if isinstance(schedule.get("name"), str):
        options = {key: value for key, value in schedule.items() if key != "name"}
        yield Call(schedule["name"], options, Schedule)


def _table(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}

"""The schedules, one file each. Importing this package registers all of them, and their classes are its attributes.

Imports `search` and the wings above it (order: docs/architecture.md).
Begin with `fixed`, the shortest.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from repfx.change.schedule import SCHEDULES

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def __getattr__(name: str) -> Any:
    for schedule in SCHEDULES.values():
        if schedule.__name__ == name and schedule.__module__.startswith(__name__):
            return schedule
    raise AttributeError(
        f"repfx has no schedule {name}; it has {', '.join(each.__name__ for each in SCHEDULES.values())}."
    )

"""The branch kinds, one file each. Importing this package registers all of them.

Imports `blocks` and the wings above it (order: docs/architecture.md).
Begin with `pointwise`, the shortest.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

"""The passes, verbs and rules, one file each. Importing this package registers all of them.

Imports `measuring` and the wings above it (order: docs/architecture.md).
Begin with `fold_batch_norm` (a rule) or `fuse` (a verb).
"""

from __future__ import annotations

import importlib
import pkgutil

for _found in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_found.name}")
    if hasattr(_module, _found.name):  # a verb stands for its file: `repfx.passes.gate(model, site)`
        globals()[_found.name] = getattr(_module, _found.name)

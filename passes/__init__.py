"""The passes: verbs here and rules in `rules`, one file each. Importing this package registers all of them.

Imports `exported` and the wings above it (order: docs/architecture.md).
Begin with `fuse` (a verb) or `rules/fold_batch_norm` (a rule).
"""

from __future__ import annotations

import importlib
import pkgutil

from repfx.rewriting.rule import PASSES

for _found in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_found.name}")
    for _name, _value in list(vars(_module).items()):  # verbs stand for their files: `repfx.passes.gate(model, site)`
        if _name in PASSES.known and getattr(_value, "__module__", None) == _module.__name__:
            globals()[_name] = _value

"""The passes, verbs and rules, one file each; importing this package registers all of them.

Imports measuring and below. Begin with `fold_batch_norm` (a rule) or `fuse` (a verb).
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

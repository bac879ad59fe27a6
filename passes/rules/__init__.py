"""The rules that `fuse` runs, one file each. Importing this package registers all of them.

Begin with `fold_batch_norm`.
"""

from __future__ import annotations

import importlib
import pkgutil

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")

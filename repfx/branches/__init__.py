"""The branch kinds, one file each; importing this package registers all of them.

Imports blocks and below. Begin with `pointwise`, the shortest.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

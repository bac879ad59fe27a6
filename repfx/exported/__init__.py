"""Programs of `torch.export` and graphs of ATen operators: raised to the words that rules read, fused, and lowered again.

Imports `measuring` and the wings above it (order: docs/architecture.md).
Begin with `fusing`.
"""

from __future__ import annotations

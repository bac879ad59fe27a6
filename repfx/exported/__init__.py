"""Programs of `torch.export` and graphs of ATen operators: raised to the words that rules read, fused, and lowered again."""

from __future__ import annotations

"""Where the time of a model goes, layer by layer, before and after fusing.

Imports `onnx` and the wings above it (order: docs/architecture.md).
Begin with `profile`.
"""

from __future__ import annotations

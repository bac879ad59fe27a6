"""Training runs on the Hugging Face Hub: pushed with a model card, and loaded from there.

Imports `training` and the wings above it (order: docs/architecture.md), and the package of the `hub` extra.
Begin with `repository`.
"""

from __future__ import annotations

from repfx.hub.repository import load as load
from repfx.hub.repository import push as push

"""repfx inside training frameworks. Each package needs an extra of its own.

Imports all wings above it (order: docs/architecture.md).
Begin with `lightning`.
"""

"""Reading code as text: what functions do with the modules that they hold.

Imports `algebra` and the wings above it (order: docs/architecture.md). It runs none of the code that it reads.
Begin with `module_uses`.
"""

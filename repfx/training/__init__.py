"""Training: the loop, recipes, the engine, the loss, run folders, and the main job in one call.

Imports `data` and the wings above it (order: docs/architecture.md), and the packages of the `train` extra.
Begin with `experiment`; `interruption` handles Ctrl-C.
"""

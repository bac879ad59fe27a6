"""Structure that changes while a model trains: the base of schedules, the driver, optimizers that follow, checkpoints.

Imports `passes` and the wings above it (order: docs/architecture.md).
Begin with `schedule` (what decides), then `driver` (what acts); `checkpoint` has the file format.
"""

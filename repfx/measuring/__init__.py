"""Numbers about models: float64 copies, differences, equivalence, calibration on data, and cost.

Imports `rewriting` and the wings above it (order: docs/architecture.md).
Begin with `equivalence`.
"""

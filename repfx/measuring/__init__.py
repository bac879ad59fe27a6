"""Numbers about models: float64 copies, differences, equivalence, calibration on data, and cost.

Imports graphs, rewriting and below. Begin with `equivalence`.
"""

"""Reading graphs: the meaning of a node as a linear map, constants, sums, borders, and which nodes share memory.

Imports `blocks` and the wings above it (order: docs/architecture.md).
Begin with `operations`.
"""

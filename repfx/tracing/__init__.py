"""Making graphs of models: tracing with torch.fx, islands, what code may do, and the sites of a model.

Imports `graphs` and the wings above it (order: docs/architecture.md).
Begin with `trace`.
"""

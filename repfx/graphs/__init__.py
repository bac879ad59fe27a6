"""Reading models: tracing with torch.fx, islands, the meaning of a node, and the sites of a model.

Imports `blocks` and the wings above it (order: docs/architecture.md). It changes no graph.
Begin with `trace`.
"""

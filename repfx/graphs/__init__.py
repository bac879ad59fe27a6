"""Reading models: tracing with torch.fx, islands, what a node means, and which sites a model has.

Imports blocks and below. It changes no graph. Begin with `trace`.
"""

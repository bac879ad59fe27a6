"""repfx inside the training frameworks that people use; each package needs its own extra.

Imports everything above it. Begin with `lightning`.
"""

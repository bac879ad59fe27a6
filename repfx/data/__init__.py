"""Data sets by name, image files, augmentation and batches.

Imports `repfx.errors` and records, and the packages of the `train` extra. Begin with `dataset`.
"""

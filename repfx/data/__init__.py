"""Data sets by name, image files, augmentation and batches.

Imports `errors`, `records` and `algebra`, and the packages of the `train` extra.
Begin with `dataset`.
"""

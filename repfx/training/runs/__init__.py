"""The parts of a run as a whole: its history, its best epoch, its numbers, more epochs for it, and a run to compare it with.

Begin with `best`.
"""

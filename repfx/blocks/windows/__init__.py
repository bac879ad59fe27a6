"""What a block's conv sees: the covariance of its input's windows, from which the deviation of any kernel's output follows.

Imports the wings above `blocks`. Begin with `covariance`.
"""

"""The covariance of the windows that a block's conv sees. The deviation of any kernel's output follows from it.

Imports the wings above `blocks`. Begin with `covariance`.
"""

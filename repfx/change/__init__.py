"""Structure that changes while a model trains: schedules' base, the driver, optimizers carried along, checkpoints.

Imports passes and below. Begin with `schedule` (what decides), then `driver` (what acts); `checkpoint` has the file format.
"""

"""repfx inside the training frameworks that people use; each module needs its own extra."""

"""HTML pages about a training run and about a model: one file each, which needs nothing else and no network."""

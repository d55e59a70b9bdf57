"""A run on disk: folder, checkpoints, log, metrics."""

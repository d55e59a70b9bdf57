"""The loop around a method: training, evaluation, checkpoints, logs."""

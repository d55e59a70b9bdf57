"""Training loop, optimiser step, evaluation and prediction."""

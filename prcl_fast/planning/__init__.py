"""Plans, memory estimates and profiles of a training step."""

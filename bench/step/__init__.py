"""Benchmarks of the whole training step."""

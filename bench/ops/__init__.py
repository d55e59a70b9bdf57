"""Benchmarks of single ops and of the whole contrast."""

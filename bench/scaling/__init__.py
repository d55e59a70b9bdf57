"""Benchmarks of several processes."""

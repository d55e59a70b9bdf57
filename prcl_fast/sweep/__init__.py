"""Sweeps: many runs from one file, their table and figure."""

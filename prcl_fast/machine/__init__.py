"""The machine: its memory and its description."""

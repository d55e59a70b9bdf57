"""Plain PyTorch versions of every op: the specification, and the `torch` backend on every device."""

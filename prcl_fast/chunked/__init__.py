"""Plain PyTorch in chunks: the `torch` backend of ops whose reference would hold too much memory."""

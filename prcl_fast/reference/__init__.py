"""Specification of every op in plain PyTorch; also its `torch` backend where `prcl_fast.chunked` has none."""

"""Semi-supervised semantic segmentation with probabilistic representations (PRCL)."""

__version__ = "0.2.0"

"""Tools for data sets: scan, splits, mask conversion."""

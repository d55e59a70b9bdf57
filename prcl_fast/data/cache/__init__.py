"""The cache of decoded training images."""

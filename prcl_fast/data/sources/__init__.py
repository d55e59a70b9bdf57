"""Data sets: VOC, Cityscapes, folders, generated images; labels, lists."""

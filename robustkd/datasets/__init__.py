"""Shelf of data sets: one file each; every split comes as uint8 images, labels and class names."""

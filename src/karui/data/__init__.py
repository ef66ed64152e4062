"""Data sets, splits, calibration subsets, augmentation."""

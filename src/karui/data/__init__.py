"""Data sets, splits, calibration subsets, augmentation."""

from karui.data.batches import Batches as Batches
from karui.data.batches import targets_of as targets_of
from karui.data.calibration import calibration_batches as calibration_batches
from karui.data.sources import load_data as load_data
from karui.data.splits import Splits as Splits
from karui.data.splits import hold_out as hold_out

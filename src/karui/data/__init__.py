"""Data sets, splits, calibration subsets, augmentation."""

from karui.data.augment import Augmentation as Augmentation
from karui.data.augment import Compose as Compose
from karui.data.augment import HorizontalFlip as HorizontalFlip
from karui.data.augment import RandomCrop as RandomCrop
from karui.data.batches import Batches as Batches
from karui.data.batches import targets_of as targets_of
from karui.data.batches import tensors_of as tensors_of
from karui.data.calibration import Calibration as Calibration
from karui.data.calibration import calibration_batches as calibration_batches
from karui.data.check import check as check
from karui.data.check import check_fit as check_fit
from karui.data.check import misfit as misfit
from karui.data.cifar import cifar10 as cifar10
from karui.data.sources import load_data as load_data
from karui.data.splits import Splits as Splits
from karui.data.splits import hold_out as hold_out

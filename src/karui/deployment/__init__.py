"""The forms in which a model is deployed: engine, precision, and the choice between them by measurement."""

from karui.deployment.int8 import Calibrated as Calibrated
from karui.deployment.int8 import Int8 as Int8
from karui.deployment.int8 import Int8Form as Int8Form
from karui.deployment.int8 import calibrate as calibrate
from karui.deployment.int8 import quantise as quantise
from karui.deployment.int8 import to_int8 as to_int8

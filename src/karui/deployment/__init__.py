"""The forms in which a model is deployed: engine, precision, and the choice between them by measurement."""

from karui.deployment.choice import ENGINES as ENGINES
from karui.deployment.choice import Deployment as Deployment
from karui.deployment.choice import Raced as Raced
from karui.deployment.choice import choose as choose
from karui.deployment.choice import deployments as deployments
from karui.deployment.choice import race as race
from karui.deployment.dynamic import mostly_linear as mostly_linear
from karui.deployment.dynamic import quantise_dynamically as quantise_dynamically
from karui.deployment.int8 import Calibrated as Calibrated
from karui.deployment.int8 import Int8 as Int8
from karui.deployment.int8 import Int8Form as Int8Form
from karui.deployment.int8 import Precision as Precision
from karui.deployment.int8 import calibrate as calibrate
from karui.deployment.int8 import quantise as quantise
from karui.deployment.int8 import to_int8 as to_int8
from karui.deployment.running import as_model as as_model
from karui.deployment.sensitivity import Harm as Harm
from karui.deployment.sensitivity import Spared as Spared
from karui.deployment.sensitivity import layer_harms as layer_harms
from karui.deployment.sensitivity import leave_worst as leave_worst

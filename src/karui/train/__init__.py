"""The one training loop, and what a technique may do while it runs."""

from karui.train.influence import Influence as Influence
from karui.train.influence import Moment as Moment
from karui.train.influence import Together as Together
from karui.train.loop import fit as fit
from karui.train.paced import Paced as Paced
from karui.train.rate import RateRange as RateRange
from karui.train.rate import range_test as range_test
from karui.train.rate import with_rate as with_rate
from karui.train.training import SGD as SGD
from karui.train.training import Adam as Adam
from karui.train.training import AdamW as AdamW
from karui.train.training import Constant as Constant
from karui.train.training import Cosine as Cosine
from karui.train.training import Steps as Steps
from karui.train.training import Training as Training
from karui.train.turn import Turn as Turn

"""The one training loop, and what a technique may do while it runs."""

from karui.train.influence import Influence as Influence
from karui.train.influence import Moment as Moment
from karui.train.influence import Together as Together

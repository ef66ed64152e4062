"""The protocol of a technique, and what it is handed."""

from karui.technique.bench import Bench as Bench
from karui.technique.bench import measure as measure
from karui.technique.candidate import Candidate as Candidate
from karui.technique.candidate import Offers as Offers
from karui.technique.card import KINDS as KINDS
from karui.technique.card import Card as Card
from karui.technique.compose import Then as Then
from karui.technique.protocol import Technique as Technique
from karui.technique.protocol import card_of as card_of
from karui.technique.protocol import lacking as lacking
from karui.technique.protocol import require_passes as require_passes
from karui.technique.protocol import technique as technique

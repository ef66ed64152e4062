"""The catalogue: 80 papers and the techniques that implement them. Read from source files, so it starts fast."""

from karui.index import room
from karui.survey.findings import measured as measured
from karui.survey.papers import CHAPTERS as CHAPTERS
from karui.survey.papers import Coverage as Coverage
from karui.survey.papers import Row as Row
from karui.survey.papers import catalogue as catalogue
from karui.survey.papers import coverage as coverage
from karui.survey.papers import find as find
from karui.survey.papers import find_technique as find_technique

__getattr__, _ = room(__name__)

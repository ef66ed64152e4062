"""Chapter 7: structured matrices."""

from karui.index import room

__getattr__, __dir__ = room(__name__)

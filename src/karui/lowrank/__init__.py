"""Chapter 2: low-rank approximation."""

from karui.index import room

__getattr__, __dir__ = room(__name__)

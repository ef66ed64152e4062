"""Chapter 5: architecture search."""

from karui.index import room

__getattr__, __dir__ = room(__name__)

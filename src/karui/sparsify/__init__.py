"""Chapter 6: sparse models."""

from karui.index import room

__getattr__, __dir__ = room(__name__)

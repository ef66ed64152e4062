"""Chapter 8: fast convolution."""

from karui.index import room

__getattr__, __dir__ = room(__name__)

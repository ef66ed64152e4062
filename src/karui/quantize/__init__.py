"""Chapter 4: binary and low-bit networks."""

from karui.index import room

__getattr__, __dir__ = room(__name__)

"""Chapter 1: fast architectures, built from scratch."""

from karui.index import room

__getattr__, __dir__ = room(__name__)

"""Chapter 3: distillation."""

from karui.index import room

__getattr__, __dir__ = room(__name__)

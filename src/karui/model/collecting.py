"""Garbage collection while a network is analysed and cut."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def newest_alone() -> Iterator[None]:
    """Collections look only through what is made meanwhile.

    Analysis keeps nearly all of the small objects that it makes, which is what makes Python look through everything
    there is: as many objects of imported packages as take longer than a cut. Cycles that are made here are collected
    as ever. Where somebody has frozen objects already, all is left as it is, as they would be thawed with ours.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

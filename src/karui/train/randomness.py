"""Randomness that depends on where a training is, not on what ran before.

Each step draws from generators seeded by (seed, step, process). So nothing has to be stored for a training to be taken
up again in the middle with the same outcome, and a training neither feels nor moves the caller's own generators.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*parts: int | str) -> int:
    """A seed of 63 bits made from the parts: different parts, unrelated seeds.

    Example:
        >>> seed_of(0, "shuffle", 1) == seed_of(0, "shuffle", 1), seed_of(0, "shuffle", 1) == seed_of(0, "shuffle", 2)
        (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A generator of its own, on the CPU, seeded by the parts."""
    return torch.Generator().manual_seed(seed_of(*parts))


def reseed(*parts: int | str) -> None:
    """Seed the global generators of torch, numpy and Python: dropout, and whatever a user's own code draws from."""
    seed = seed_of(*parts)
    # torch.manual_seed would queue a call for each accelerator that is not there yet, 0.1 ms and some memory a time
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  (users' augmentations draw from the legacy generator)


@contextmanager
def undisturbed() -> Iterator[None]:
    """The caller's global generators are afterwards as they were."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002

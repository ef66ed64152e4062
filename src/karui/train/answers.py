"""What teachers have said, kept by the content of the samples: in memory, or in files that outlive the process.

A training draws its batches and their augmentation by (seed, step, process). So every student that is trained with the
same seed and settings sees the very same samples, as does a training that is taken up again, and the teacher has to run
only once for all of them. Answers are found by digest, and are therefore right whatever was drawn.
"""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from karui.measuring.inference import tensors_of
from karui.train.piles import KEY, Pile, records, write

SPAN = 2**44
"""Bytes that a pile can have: a place is a pile's number times this, and a byte in it."""
LONG = 2**14
"""Bytes of a sample from which on its digest is a cryptographic one, taken sample by sample: it is then as fast."""


class Answers:
    """A memory of answers. It says nothing of itself, so that two trainings do not differ by it.

    Args:
        room: number of samples whose answers are kept at most, of those that were asked for here; later ones are asked
            for each time. What others have left in the folder takes no room.
        folder: where answers are kept for later processes; None keeps them in memory only. Each process writes a file
            of its own, so that several may use one folder; what a killed one left half written is passed over.
        half: keep 16 bits of each number. Who asks first is given the rounded numbers too, so that all students learn
            from the same.
        why: whether answers are kept and for what reason, for people; None tells it of the other arguments.

    Example:
        >>> asked = []
        >>> answers = Answers(room=10)
        >>> def ask(inputs):
        ...     asked.append(len(inputs[0]))
        ...     return inputs[0].sum(1, keepdim=True)[None]
        >>> x = torch.arange(6.0).reshape(3, 2)
        >>> answers.of((x,), ask).tolist() == answers.of((x,), ask).tolist(), asked
        (True, [3])
    """

    __slots__ = ("_file", "_numbers", "_others", "_piles", "_places", "_told", "_without", "folder", "half", "room")

    def __init__(self, room: int, folder: Path | None = None, *, half: bool = False, why: str | None = None) -> None:
        self.room = room
        self.folder = folder
        self.half = half
        kept = (
            f"answers for up to {room:,} samples are kept {self._where}" if room else "answers are not kept, as asked"
        )
        self._told = f"teacher: {kept}" if why is None else why
        self._without = 0
        self._piles: list[Pile] = []
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._places: dict[bytes, int] = {}
        self._file: Path | None = None
        for file in sorted(folder.glob("*.answers")) if folder is not None else ():
            for keys, start, shape, kind in records(file):
                self._note(keys, self._pile(shape, kind, file), start)
        self._others = set(self._places)

    def __len__(self) -> int:
        """Number of samples whose answers are known."""
        return len(self._places)

    @property
    def why(self) -> str:
        """Whether answers are kept, for people; that they were to be is not the truth where the room was too small."""
        if not self._without:
            return self._told
        kept = f"answers for {self.room:,} samples are kept {self._where}"
        return f"teacher: {kept}; {self._without:,} times it was asked about a sample for which there was no room"

    @property
    def _where(self) -> str:
        return "in memory" if self.folder is None else "beside the checkpoints"

    def of(
        self,
        inputs: tuple[Any, ...],
        ask: Callable[[tuple[Any, ...]], Float[Tensor, "teachers batch classes *positions"]],
    ) -> Float[Tensor, "teachers batch classes *positions"]:
        """What is known of a batch, and what `ask` says of the samples of it that are new."""
        tensors = tensors_of(inputs)
        keys = _digests(tensors)
        if self._others:
            self._others.difference_update(keys)
        places = [self._places.get(key) for key in keys]
        known = {row: place for row, place in enumerate(places) if place is not None}
        new = [row for row in range(len(keys)) if row not in known]
        if not new:
            return self._gathered(list(known.values())).to(tensors[0].device)
        if not known:
            return self._asked(keys, inputs, ask)
        kept = self._gathered(list(known.values()))
        part = pytree.tree_map(lambda leaf: leaf[new] if isinstance(leaf, Tensor) else leaf, inputs)
        fresh = self._asked([keys[row] for row in new], part, ask)
        whole = fresh.new_empty(len(fresh), len(keys), *fresh.shape[2:])
        whole[:, new], whole[:, list(known)] = fresh, kept.to(fresh)
        return whole

    def _asked(self, keys: list[bytes], inputs: tuple[Any, ...], ask: Callable[[tuple[Any, ...]], Tensor]) -> Tensor:
        """What `ask` says of samples that are new, kept as far as there is room."""
        answers = ask(inputs)
        if self.half:
            answers = answers.to(torch.float16).to(torch.float32)
        if answers.dtype == torch.float32 and answers.shape[1] == len(keys):  # wider ones would come back narrower
            self._keep(keys, answers.detach().cpu())
        return answers

    def _gathered(self, places: list[int]) -> Float[Tensor, "teachers batch classes *positions"]:
        """The answers at these places: one operation for each pile, and nearly always there is one."""
        offsets = np.array(places)
        if len(self._piles) == 1:
            rows = self._piles[0].rows(offsets).astype(np.float32, copy=False)
        else:
            numbers, offsets = np.divmod(offsets, SPAN)
            rows = np.empty((len(places), *self._piles[numbers[0]].shape), np.float32)
            for number in set(numbers.tolist()):
                rows[numbers == number] = self._piles[number].rows(offsets[numbers == number])
        return torch.from_numpy(rows).transpose(0, 1).contiguous()

    def _keep(self, keys: list[bytes], answers: Tensor) -> None:
        fresh = {key: row for row, key in enumerate(keys) if key not in self._places}
        rows = list(fresh.values())[: max(0, self.room - len(self._places) + len(self._others))]
        self._without += len(fresh) - len(rows)
        if not rows:
            return
        kept = answers if len(rows) == len(keys) else answers[:, rows]
        values = kept.transpose(0, 1).contiguous().numpy().astype("<f2" if self.half else "<f4")
        fresh = [keys[row] for row in rows]
        number = self._pile(values.shape[1:], values.dtype.str, self._own(self.folder) if self.folder else None)
        pile = self._piles[number]
        self._note(fresh, number, pile.add(values) if pile.file is None else write(pile.file, fresh, values))

    def _pile(self, shape: tuple[int, ...], kind: str, file: Path | None) -> int:
        """The number of the pile for such rows, there or in memory."""
        number = self._numbers.setdefault((file, shape, kind), len(self._piles))
        if number == len(self._piles):
            self._piles.append(Pile(shape, kind, file))
        return number

    def _note(self, keys: list[bytes], number: int, start: int) -> None:
        """Remember where these samples' rows are: one after another from a byte of a pile."""
        place, length = number * SPAN + start, self._piles[number].length
        for row, key in enumerate(keys):
            self._places.setdefault(key, place + row * length)

    def _own(self, folder: Path) -> Path:
        """This process's file."""
        if self._file is None or not self._file.name.startswith(f"{os.getpid()}-"):  # a forked process has its own
            folder.mkdir(parents=True, exist_ok=True)
            self._file = folder / f"{os.getpid()}-{secrets.token_hex(4)}.answers"
        return self._file


def _digests(tensors: list[Tensor]) -> list[bytes]:
    """A digest of each sample over all tensors of the call.

    Of short samples it is a multilinear one: one product of matrices for a batch, where a cryptographic one is a call
    for each sample. Two samples of whatever content agree by it with a chance of 2^-66 at most.
    """
    parts = [value.detach().cpu().contiguous() for value in tensors]
    told, factors, start = _factors(tuple((part.dtype, part.shape[1:]) for part in parts), _narrowed(tensors))
    rows = [part.reshape(len(part), -1).view(torch.uint8).numpy() for part in parts]
    if factors is None:
        return [
            hashlib.blake2b(b"".join((told, *(row.tobytes() for row in sample))), digest_size=KEY).digest()
            for sample in zip(*rows, strict=True)
        ]
    width = sum(row.shape[1] for row in rows)
    if width % 4 or len(rows) > 1:
        rows = [np.concatenate([*rows, np.zeros((len(rows[0]), -width % 4), np.uint8)], axis=1)]
    # Not `@`, which would first make a wider copy of all words.
    sums = (np.einsum("sw,kw->sk", rows[0].view("<u4"), factors) + start).tobytes()
    return [sums[place : place + KEY] for place in range(0, len(sums), KEY)]


def _narrowed(tensors: list[Tensor]) -> str:
    """The precision that a training computes in where that is not the tensors' own: answers are rounded by it."""
    kind = tensors[0].device.type
    narrow = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return str(torch.get_autocast_dtype(kind)) if narrow else ""


@functools.lru_cache(maxsize=64)
def _factors(
    told: tuple[tuple[torch.dtype, torch.Size], ...], narrowed: str
) -> tuple[bytes, np.ndarray | None, np.ndarray]:
    """For samples of such tensors: what they are, by what each word of 32 bits is multiplied, and what is added.

    Drawn once and for all, as files outlive processes; long samples have no factors.

    Source: Dietzfelbinger 1996, "Universal hashing and k-wise independent random variables via integer arithmetic":
    words of 32 bits, sums modulo 2^64, here two of them.
    """
    name = (repr(list(told)) + narrowed).encode()
    start = np.frombuffer(hashlib.blake2b(name, digest_size=KEY).digest(), "<u8")
    width = sum(dtype.itemsize * shape.numel() for dtype, shape in told)
    factors = np.random.PCG64(30).random_raw(2 * -(-width // 4)).reshape(2, -1) if width < LONG else None
    return name, factors, start

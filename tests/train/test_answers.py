"""Answers that are kept are the answers, across students, processes and crashes; and they save the teacher's work."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from karui.data import Compose, HorizontalFlip, RandomCrop, Splits
from karui.distill import KnowledgeDistillation
from karui.model import Model
from karui.technique import Bench
from karui.train import Adam, Constant, Training, fit
from karui.train.answers import Answers
from karui.train.piles import HEAD
from karui.train.teaching import SoftTargets, Teachers

AUGMENTED = Training(
    epochs=2, batch_size=120, optimizer=Adam(lr=1e-2), schedule=Constant(),
    augment=Compose((RandomCrop(1), HorizontalFlip())),
)  # fmt: skip


class Asked:
    """Says three numbers of each sample, and counts how often it was asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, inputs: tuple[Any, ...]) -> Tensor:
        self.times += 1
        return torch.stack([inputs[0].sum(1), inputs[0].amax(1), inputs[0].amin(1) / 3], dim=1)[None]


def batch(seed: int, count: int = 4) -> tuple[Tensor, ...]:
    return (torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)),)


def same(a: Model, b: Model) -> bool:
    ours, theirs = a.module.state_dict(), b.module.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
def test_known_answers_are_given_without_asking(tmp_path: Path, on_disk: bool, half: bool) -> None:
    ask, answers = Asked(), Answers(100, tmp_path if on_disk else None, half=half)
    first = [answers.of(batch(seed), ask) for seed in range(3)]
    again = [answers.of(batch(seed), ask) for seed in range(3)]
    assert ask.times == 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[0], ask(batch(0))) is not half
    torch.testing.assert_close(first[0], ask(batch(0)), rtol=1e-3, atol=1e-3)
    mixed = (torch.cat([batch(1)[0][2:], batch(0)[0][1:2]]),)
    want = torch.cat([first[1][:, 2:], first[0][:, 1:2]], dim=1)
    assert torch.equal(answers.of(mixed, ask), want)
    assert ask.times == 5


@pytest.mark.parametrize("on_disk", [False, True])
def test_only_samples_that_are_new_are_asked_about(tmp_path: Path, on_disk: bool) -> None:
    asked: list[int] = []

    def ask(inputs: tuple[Any, ...]) -> Tensor:
        asked.append(len(inputs[0]["x"]))
        return Asked()((inputs[0]["x"],))

    x = batch(0, 64)[0]
    answers, draw = Answers(48, tmp_path if on_disk else None), torch.Generator().manual_seed(0)
    for _ in range(6):
        for rows in torch.randperm(64, generator=draw).split(16):
            assert torch.equal(answers.of(({"x": x[rows]},), ask), Asked()((x[rows],)))
    assert sum(asked) == 48 + 6 * 16
    assert answers.why.endswith("96 times it was asked about a sample for which there was no room")


def test_room_counts_samples() -> None:
    ask, answers = Asked(), Answers(6)
    for seed in (0, 1, 0, 1):
        assert torch.equal(answers.of(batch(seed), ask), Asked()(batch(seed)))
    assert len(answers) == 6
    assert ask.times == 3  # half of the second batch did not find room


def test_every_input_and_its_kind_counts() -> None:
    ask, answers = Asked(), Answers(100)
    x = torch.zeros(2, 5)
    for inputs in ((x,), (x, torch.ones(2)), (x, torch.zeros(2)), (x.double().float() * 1,), (x.int(),), (x[:, :4],)):
        answers.of(inputs, ask)
    assert ask.times == 5
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answers.of((x.int(),), ask)
    assert ask.times == 6, "what is said in another precision is another answer"


def test_numbers_that_would_lose_digits_are_not_kept() -> None:
    answers = Answers(100)
    wide = answers.of(batch(0), lambda inputs: Asked()((inputs[0].double(),)))
    assert wide.dtype == torch.float64
    assert len(answers) == 0


def test_what_others_left_takes_no_room(tmp_path: Path) -> None:
    others = Answers(100, tmp_path)
    for seed in range(3):
        others.of(batch(seed), Asked())
    ask, answers = Asked(), Answers(8, tmp_path)
    for seed in (0, 7, 0, 7, 1):  # what is asked for here counts, whoever asked first
        assert torch.equal(answers.of(batch(seed), ask), Asked()(batch(seed)))
    assert ask.times == 1
    assert answers.why == "teacher: answers for up to 8 samples are kept beside the checkpoints"
    for _ in range(2):
        answers.of(batch(8), ask)
    assert ask.times == 3
    assert answers.why == (
        "teacher: answers for 8 samples are kept beside the checkpoints; "
        "8 times it was asked about a sample for which there was no room"
    )


def test_answers_on_disk_are_mapped_and_samples_told_apart_by_one_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, answers = Asked(), Answers(100, tmp_path)
    first = [answers.of(batch(seed), ask) for seed in range(3)]
    later = Answers(100, tmp_path)
    assert torch.equal(later.of(batch(0), ask), first[0])
    told: list[Any] = []
    monkeypatch.setattr(hashlib, "blake2b", lambda *given, **_: told.append(given))
    monkeypatch.setattr(Path, "open", lambda *given, **_: told.append(given))
    for known in (answers, later):
        assert all(torch.equal(known.of(batch(seed), ask), first[seed]) for seed in range(3))
    assert told == []
    assert ask.times == 3


@pytest.mark.parametrize("shapes", [((3,),), ((5, 2), (1,)), ((5000,),)], ids=["short", "two inputs", "long"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_every_bit_of_a_sample_counts(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    def sample() -> list[Tensor]:
        return [torch.zeros(1, *shape, dtype=dtype) for shape in shapes]

    changed = [sample()]
    for part in range(len(shapes)):
        for place in range(min(12, 8 * changed[0][part].nbytes)):
            for bit in {1 << place % 8, 0x80}:  # the sign of a number is a bit by itself, and so are two signs
                one = sample()
                one[part].view(torch.uint8).view(-1)[place % one[part].nbytes] ^= bit
                changed.append(one)
                two = [each.clone() for each in one]
                two[-1].view(torch.uint8).view(-1)[-1] ^= 0x80
                changed.append(two)
    different = {tuple(bytes(each.view(torch.uint8).view(-1).tolist()) for each in one) for one in changed}
    together = [torch.cat([one[part] for one in changed]) for part in range(len(shapes))]
    answers = Answers(10_000)
    answers.of(tuple(together), lambda inputs: torch.zeros(1, len(inputs[0]), 2))
    assert len(answers) == len(different)


def test_several_teachers_answers_come_back_in_their_places_from_several_files(tmp_path: Path) -> None:
    def two(inputs: tuple[Any, ...]) -> Tensor:
        return torch.cat([Asked()(inputs), -Asked()(inputs)])

    for folder in (None, tmp_path):
        answers = Answers(100, folder)
        for seed in (0, 1):
            assert torch.equal(answers.of(batch(seed), two), two(batch(seed)))
        Answers(100, folder).of(batch(2), two)
    mixed = (torch.cat([batch(2)[0][:2], batch(0)[0][1:], batch(1)[0][2:3]]),)
    later = pickle.loads(pickle.dumps(Answers(100, tmp_path)))  # noqa: S301  (as a process that is spawned gets it)
    assert torch.equal(later.of(mixed, lambda _: torch.empty(0)), two(mixed))
    assert two(mixed).numpy().tobytes()[:8] not in pickle.dumps(later), "what is mapped stays in its file"


def test_files_of_an_older_form_are_passed_over(tmp_path: Path) -> None:
    Answers(100, tmp_path).of(batch(0), Asked())
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(struct.pack("<I", zlib.crc32(whole[HEAD.size :])) + whole[4:])
    assert len(Answers(100, tmp_path)) == 0


def test_a_later_process_finds_them(tmp_path: Path) -> None:
    script = f"""
import torch
from pathlib import Path
from karui.train.answers import Answers
x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
Answers(100, Path({str(tmp_path)!r})).of((x,), lambda inputs: inputs[0].sum(1, keepdim=True)[None])
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    ask, answers = Asked(), Answers(100, tmp_path)
    assert torch.equal(answers.of(batch(0), ask), batch(0)[0].sum(1, keepdim=True)[None])
    assert ask.times == 0
    answers.of(batch(1), ask)
    assert len(list(tmp_path.iterdir())) == 2, "each process writes a file of its own"
    assert len(Answers(100, tmp_path)) == 8


def test_what_was_cut_off_or_damaged_is_asked_again(tmp_path: Path) -> None:
    answers = Answers(100, tmp_path)
    for seed in range(3):
        answers.of(batch(seed), Asked())
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    length = len(whole) // 3
    for cut in range(2 * length, 3 * length, 7):
        file.write_bytes(whole[:cut])
        assert len(Answers(100, tmp_path)) == 8
    for place in range(length, 2 * length, 5):
        data = bytearray(whole)
        data[place] ^= 1
        file.write_bytes(bytes(data))
        ask, found = Asked(), Answers(100, tmp_path)
        assert torch.equal(found.of(batch(1), ask), Asked()(batch(1)))
        assert ask.times == 1
        assert len(found) == 8
        for fresh in set(tmp_path.iterdir()) - {file}:
            fresh.unlink()


def test_a_forked_process_writes_a_file_of_its_own(tmp_path: Path) -> None:
    answers = Answers(100, tmp_path)
    answers.of(batch(0), Asked())
    child = os.fork()
    if child == 0:
        answers.of(batch(1), Asked())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    answers.of(batch(2), Asked())
    assert len(list(tmp_path.iterdir())) == 2
    assert len(Answers(100, tmp_path)) == 12


@pytest.mark.parametrize("half", [False, True])
def test_students_are_the_same_with_and_without_and_the_teacher_runs_once(
    digits: Splits, small_cnn: Callable[..., Model], tmp_path: Path, half: bool
) -> None:
    teacher, students = small_cnn(seed=1), (small_cnn((4, 4, 4)), small_cnn((6, 4, 8)))
    kept = Teachers((teacher,), 10_000, tmp_path, half=half)
    runs = []
    kept.modules[0].register_forward_hook(lambda *_: runs.append(1))
    taught = [fit(s, digits.train, training=AUGMENTED, influence=SoftTargets(teachers=kept)) for s in students]
    assert len(runs) == 2 * 9, "the second student's batches are those of the first"
    bare = SoftTargets(teachers=Teachers((teacher,)))
    plain = [fit(s, digits.train, training=AUGMENTED, influence=bare) for s in students]
    assert [same(a, b) for a, b in zip(taught, plain, strict=True)] == [not half] * 2
    later = Teachers((teacher,), 10_000, tmp_path, half=half)
    later.modules[0].register_forward_hook(lambda *_: runs.append(1))
    again = [fit(s, digits.train, training=AUGMENTED, influence=SoftTargets(teachers=later)) for s in students]
    assert all(same(a, b) for a, b in zip(taught, again, strict=True)), "who asked first learned from the same"
    assert len(runs) == 2 * 9


def test_another_seed_or_teacher_is_asked_anew(digits: Splits, small_cnn: Callable[..., Model], tmp_path: Path) -> None:
    training = replace(AUGMENTED, epochs=1)
    for seed, teacher in ((0, 1), (0, 1), (5, 1), (0, 2)):
        soft = SoftTargets(teachers=Teachers((small_cnn(seed=teacher),), 10_000, tmp_path))
        fit(small_cnn((4, 4, 4)), digits.train, training=training, influence=soft, seed=seed)
    samples = sorted(len(Answers(10_000, folder)) for folder in tmp_path.iterdir())
    assert samples[0] == 1080
    assert 1080 < samples[1] <= 2160, "two seeds may draw the same picture, unmoved"


def test_distillation_keeps_them_beside_its_checkpoints(
    digits: Splits, small_cnn: Callable[..., Model], tmp_path: Path
) -> None:
    training = replace(AUGMENTED, epochs=1)
    bench = Bench(train=digits.train, test=digits.test, training=training, checkpoints=tmp_path)
    technique = KnowledgeDistillation(teacher=small_cnn(seed=1), epochs=1, remember=5000)
    technique.apply(small_cnn((4, 4, 4)), bench)
    (folder,) = (tmp_path / "answers").iterdir()
    before = {file: file.stat().st_size for file in folder.iterdir()}
    technique.apply(small_cnn((6, 6, 6)), bench)
    assert {file: file.stat().st_size for file in folder.iterdir()} == before
    assert len(Answers(5000, folder)) == len(bench.train)


def test_inputs_within_dictionaries_and_lists_count() -> None:
    answers, x = Answers(room=9), torch.randn(3, 4)

    def of(mask: float) -> Tensor:
        given = ({"x": x, "rest": [torch.full((3, 1), mask)]},)
        return answers.of(given, lambda inputs: (inputs[0]["x"] * inputs[0]["rest"][0])[None])

    assert torch.equal(of(1.0)[0], x)
    assert torch.equal(of(0.0)[0], torch.zeros(3, 4))
    assert torch.equal(of(1.0)[0], x)
    assert len(answers) == 6

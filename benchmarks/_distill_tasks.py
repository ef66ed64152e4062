"""The tasks of `distillation_table`: pictures, spoken digits, faces, words and a table of numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Subset, TensorDataset

from _common import cifar10, data_folder
from _distill_arms import Arm, Lesson, for_faces, for_pictures, for_rows, for_speech, for_whole_pictures, for_words
from _low_rank_nets import CONTEXT, WordLstm, perplexity, right, spoken
from _mlp import bench_of, mlp
from cifar_resnets import published
from karui.architectures.cifar_resnet import cifar_resnet
from karui.architectures.perceptron import perceptron
from karui.data import hold_out, load_data
from karui.distill._nuisances import NUISANCES, changed
from karui.distill._selection import verification_accuracy
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import SGD, Adam, Constant, Cosine, Training
from svd_softmax import corpus


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned, from whom, and in which ways.

    Settings:
        name, about: for the page.
        lesson: of a seed: student, teacher and data.
        arms: the ways, the student alone and [30] at several lengths first.
        score: of a model on test data.
        unit: of the score; perplexity is better the lower it is.
    """

    name: str
    about: str
    lesson: Callable[[int, Path], Lesson]
    arms: tuple[Arm, ...]
    score: Callable[[Model, Lesson], float]
    unit: str = "accuracy, %"


def pictures(width: float = 0.5, train: int = 2000, test: int = 2000, passes: int = 5) -> Task:
    """CIFAR-10: the published ResNet-56 teaches a ResNet-20, of half the channels or of all."""
    data = cifar10(train)
    few = Subset(data.test, range(test))
    training = Training(
        epochs=passes,
        batch_size=32,
        optimizer=SGD(lr=0.1, weight_decay=1e-4),
        schedule=Cosine(),
        channels_last=True,
    )
    teacher = published("resnet56")
    teacher.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (as the student's)
    size = "of half the channels" if width < 1 else "of all channels"

    def lesson(seed: int, folder: Path) -> Lesson:
        del folder
        torch.manual_seed(seed)
        student = Model(cifar_resnet(20, width=width), example=teacher.example, task=Classification())
        bench = Bench(train=data.train, validation=data.validation, test=few, training=training, seed=seed)
        return Lesson(student=student, teacher=teacher, bench=bench)

    return Task(
        name="pictures" if width < 1 else "pictures, whole student",
        about=f"CIFAR-10: ResNet-56 with published weights (seen all 50,000 pictures) teaches an untrained ResNet-20 "
        f"{size} on {train:,} pictures, {passes} passes (batches of 32, SGD, rate 0.1, cosine, no augmentation); the "
        f"first {test:,} test pictures judge",
        lesson=lesson,
        arms=for_pictures() if width < 1 else for_whole_pictures(),
        score=lambda model, lesson: right(model, lesson.bench),
    )


def kept(folder: Path, name: str, train: Callable[[], Model], fresh: Model) -> Model:
    """The teacher of this name: trained, or read into `fresh` from the file of an earlier run."""
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(train().module.state_dict(), file)
    read = fresh.copy()
    read.module.load_state_dict(load_file(file))
    return read


def speech(share: float = 0.2, passes: int = 20) -> Task:
    """Spoken digits: a perceptron that knows all recordings teaches one of 64 units on a fifth of them."""
    train, test = spoken()
    shape = train.tensors[0].shape[1:]
    training = Training(epochs=passes, batch_size=64, optimizer=Adam(lr=1e-3), schedule=Cosine())

    def net(seed: int, *hidden: int) -> Model:
        torch.manual_seed(seed)
        made = perceptron((shape.numel(), *hidden, 60))
        return Model(made, example=(torch.zeros(1, *shape),), task=Classification())

    def lesson(seed: int, folder: Path) -> Lesson:
        whole = Bench(train=train, test=test, training=replace(training, epochs=15), seed=seed)
        fresh = net(100 + seed, 512, 512)
        teacher = kept(folder, f"speech-{seed}", lambda: whole.fit(fresh), fresh)
        rest, labelled = hold_out(train, share, seed)
        bench = Bench(train=labelled, test=test, training=training, seed=seed)
        return Lesson(student=net(seed, 64), teacher=teacher, bench=bench, pool=rest)

    return Task(
        name="spoken digits",
        about=f"log-mel features, 60 classes of digit and speaker: a perceptron of 512 and 512 units, trained on 2,700 "
        f"recordings (15 passes), teaches one of 64 on {share:.0%} of them, {passes} passes (Adam, rate 0.001, "
        "cosine); 300 test recordings judge",
        lesson=lesson,
        arms=for_speech(),
        score=lambda model, lesson: right(model, lesson.bench),
    )


def faces(passes: int = 30) -> Task:
    """ORL: a perceptron that knows 25 people teaches a narrow one; pairs of pictures of 15 others are judged."""
    drawn = np.load(data_folder() / "orl_faces" / "orl.npz")["x"]
    x, people = torch.from_numpy(drawn.reshape(400, 1, 28, 23)).float() / 255, torch.arange(40).repeat_interleave(10)
    training = Training(epochs=passes, batch_size=64, optimizer=Adam(lr=1e-3), schedule=Constant())

    def net(seed: int, *hidden: int) -> Model:
        torch.manual_seed(seed)
        return Model(perceptron((28 * 23, *hidden, 25)), example=(torch.zeros(1, 1, 28, 23),), task=Classification())

    def lesson(seed: int, folder: Path) -> Lesson:
        draw = torch.Generator().manual_seed(seed)
        known = torch.randperm(40, generator=draw)[:25]
        names, seen = torch.zeros(40, dtype=torch.long), torch.isin(people, known)
        names[known] = torch.arange(25)
        order = torch.randperm(250, generator=draw)
        mine, named = x[seen][order], names[people[seen]][order]
        train = TensorDataset(*varied(mine[62:], named[62:], 3, seed))
        others = TensorDataset(*varied(x[~seen], people[~seen], 2, seed + 77))
        bench = Bench(
            train=train, validation=TensorDataset(mine[:62], named[:62]), test=others, training=training, seed=seed
        )
        fresh = net(100 + seed, 256, 128)
        teacher = kept(folder, f"faces-{seed}", lambda: bench.fit(fresh, epochs=15), fresh)
        return Lesson(student=net(seed, 32, 24), teacher=teacher, bench=bench)

    return Task(
        name="faces",
        about="ORL faces of 28x23: a perceptron of 256 and 128 units, trained on 25 people (15 passes), teaches one of "
        f"32 and 24 units, {passes} passes (Adam, rate 0.001); judged by 4,000 pairs of changed pictures of the 15 "
        "other people, same or different by the cosine of 24 features (its outputs for [32], else the layer before)",
        lesson=lesson,
        arms=for_faces(),
        score=verified,
        unit="pairs right, %",
    )


def varied(x: torch.Tensor, names: torch.Tensor, times: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures, and so many copies of each with all nuisances at once."""
    parts = [x]
    for number in range(times):
        other = x
        for place, change in enumerate(NUISANCES.values()):
            other, _ = changed(other, change, seed * 100 + number * 10 + place)
        parts.append(other)
    return torch.cat(parts), names.repeat(times + 1)


def verified(model: Model, lesson: Lesson) -> float:
    """Percent of the pairs of other people's pictures."""
    x, people = lesson.bench.test.tensors
    net = model.module.eval()
    assert isinstance(net, nn.Sequential)  # noqa: S101  (perceptrons are)
    with torch.no_grad():
        features = net(x) if model.task is None else net[:-1](x)
    return 100 * verification_accuracy(features, people, pairs=4000, seed=lesson.bench.seed)


def next_words(taught: int = 3, passes: int = 2, common: int = 2000) -> Task:
    """WikiText-2: an LSTM of 128 cells teaches one of 32."""
    text, judged, _ = corpus()

    def samples(numbers: torch.Tensor, step: int) -> TensorDataset:
        windows = torch.where(numbers < common, numbers, common).unfold(0, CONTEXT + 1, step)
        return TensorDataset(windows[:, :-1].contiguous(), windows[:, -1].contiguous())

    def net(seed: int, embedded: int, cells: int) -> Model:
        torch.manual_seed(seed)
        example = (torch.zeros(1, CONTEXT, dtype=torch.long),)
        return Model(WordLstm(common + 1, embedded, cells).eval(), example=example, task=Classification())

    training = Training(epochs=passes, batch_size=128, optimizer=Adam(lr=4e-3), schedule=Cosine())

    def lesson(seed: int, folder: Path) -> Lesson:
        bench = Bench(train=samples(text, 16), test=samples(judged, 40), training=training, seed=seed)
        teach = replace(bench, train=samples(text, 8), training=replace(training, epochs=taught))
        large = net(100, 64, 128)
        teacher = kept(folder, "words", lambda: teach.fit(large, label="words, teacher"), large)
        return Lesson(student=net(seed, 16, 32), teacher=teacher, bench=bench)

    return Task(
        name="words",
        about=f"the next word of WikiText-2's validation text (its test text judges), of the {common:,} most frequent "
        f"ones and one for all others: an LSTM of 128 cells, trained for {taught} passes over every eighth word, "
        f"teaches one of 32, {passes} passes over every sixteenth (batches of 128, Adam, rate 0.004, cosine)",
        lesson=lesson,
        arms=for_words(),
        score=lambda model, lesson: perplexity(model, lesson.bench),
        unit="perplexity",
    )


def rows(samples: int = 200, passes: int = 60) -> Task:
    """The 8x8 digits as 64 columns: a perceptron that knows all of them teaches on 200."""
    digits = load_data("digits")

    def lesson(seed: int, folder: Path) -> Lesson:
        fresh = mlp(64, 256, 128, 10, seed=100 + seed)
        teacher = kept(folder, f"rows-{seed}", lambda: bench_of(digits, 40, seed).fit(fresh), fresh)
        few = replace(digits, train=hold_out(digits.train, samples / len(digits.train), seed)[1])
        return Lesson(
            student=mlp(64, 32, 10, seed=seed),
            teacher=teacher,
            bench=bench_of(few, passes, seed),
            owner=bench_of(digits, passes, seed),
        )

    return Task(
        name="rows of numbers",
        about=f"the 8x8 digits as 64 columns: a perceptron of 256 and 128 units, trained on all {len(digits.train):,}, "
        f"teaches one of 32 on {samples} of them, {passes} passes (Adam, rate 0.003)",
        lesson=lesson,
        arms=for_rows(),
        score=lambda model, lesson: right(model, lesson.bench),
    )

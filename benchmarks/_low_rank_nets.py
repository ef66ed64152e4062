"""The networks of `low_rank_table`: a perceptron on spoken digits, an LSTM on words, two ResNets on CIFAR-10."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.signal import stft
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from _common import cifar10, data_folder
from _low_rank_ways import Way, of_convolutions, of_layers, of_words
from cifar_resnets import published
from karui.distill import KnowledgeDistillation
from karui.measuring import evaluate
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import SGD, Adam, Cosine, Training
from svd_softmax import corpus

FRAMES, BANDS, HOP, WINDOW, RATE = 32, 32, 200, 256, 8000
CONTEXT, EMBEDDED, CELLS = 10, 64, 128


@dataclass(frozen=True, kw_only=True)
class Net:
    """A network of the table.

    Settings:
        name, about: what it is, for the page.
        ways: what is done to it.
        bench: data and the short training of a seed.
        training: passes and settings of the training from scratch; None where weights are published.
        first: data of the training from scratch, where the short training has others.
        passes: passes of the short training.
        untrained: the network of a seed.
        score: what is told of a model on test data.
        unit: of the score.
    """

    name: str
    about: str
    ways: tuple[Way, ...]
    bench: Callable[[int], Bench]
    passes: int
    untrained: Callable[[int], Model]
    training: Training | None = None
    first: Dataset | None = None
    score: Callable[[Model, Bench], float]
    unit: str = "accuracy, %"

    def scratch(self, seed: int) -> Bench:
        """Data and settings of the training from scratch."""
        bench, training = self.bench(seed), self.training
        assert training is not None  # noqa: S101  (there are no published weights)
        return replace(bench, training=training, train=bench.train if self.first is None else self.first)

    def dense(self, seed: int, folder: Path) -> Model:
        """The trained network of a seed, kept in a folder."""
        model = self.untrained(seed)
        if self.training is None:
            return model
        file = folder / f"{self.name}-{seed}.safetensors"
        if not file.is_file():
            trained = self.scratch(seed).fit(model, label=f"{self.name} {seed}")
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(trained.module.state_dict(), file)
        model.module.load_state_dict(load_file(file))
        return model


def right(model: Model, bench: Bench) -> float:
    """Percent of the test samples."""
    return 100 * evaluate(model, bench.test).value


def perplexity(model: Model, bench: Bench) -> float:
    """On the test words."""
    context, target = bench.test.tensors
    net = model.module.eval()
    with torch.no_grad():
        parts = zip(context.split(512), target.split(512), strict=True)
        lost = sum(float(nn.functional.cross_entropy(net(x), y, reduction="sum")) for x, y in parts)
    return math.exp(lost / len(target))


def residual(name: str, pictures: int = 640, test: int = 1000) -> Net:
    """A ResNet with its published weights; the short training learns from what it says of the pictures."""
    data, dense = cifar10(pictures), published(name)
    few = Subset(data.test, range(test))
    training = Training(
        batch_size=32,
        optimizer=SGD(lr=0.001, weight_decay=1e-4),
        schedule=Cosine(),
        channels_last=True,
    )

    @functools.cache
    def bench(seed: int) -> Bench:
        # One teacher for all ways: it is asked once for each picture, as all of them train on the same ones.
        teacher = KnowledgeDistillation(teacher=published(name), remember=pictures, keep_zeros=False)
        plain = Bench(train=data.train, validation=data.validation, test=few, training=training, seed=seed)
        return plain.under(teacher.influence(dense, plain))

    return Net(
        name=name,
        about=f"ResNet-{name.removeprefix('resnet')} with published weights, CIFAR-10: 2 passes over {pictures:,} "
        "pictures (SGD, rate 0.001, cosine, no augmentation) under the dense network as a teacher ([30], temperature "
        f"4, nine tenths of the loss), judged on the first {test:,} test pictures",
        ways=of_convolutions(dense),
        bench=bench,
        passes=2,
        untrained=lambda _: dense,
        score=right,
    )


def spoken() -> tuple[TensorDataset, TensorDataset]:
    """Log-mel features of the spoken digits; the class is digit and speaker, the first five takes of each are test."""
    kept = np.load(data_folder() / "fsdd" / "fsdd.npz")
    sound = (kept["audio_hi"].astype(np.int16) << 8 | kept["audio_lo"]).astype(np.float32) / 2**15
    clips = np.split(sound, np.cumsum(kept["length"])[:-1])
    mel = np.linspace(0, 2595 * math.log10(1 + RATE / 2 / 700), BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hertz = np.fft.rfftfreq(WINDOW, 1 / RATE)
    rise = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    bank = np.clip(np.minimum(rise, fall), 0, None)
    length = HOP * (FRAMES - 1)
    made = []
    for clip in clips:
        whole = np.pad(clip[:length], (0, max(0, length - len(clip))))
        power = np.abs(stft(whole, RATE, nperseg=WINDOW, noverlap=WINDOW - HOP)[2][:, :FRAMES]) ** 2
        made.append(np.log(bank @ power + 1e-8).T)
    speakers = np.unique(kept["speaker"], return_inverse=True)[1]
    x, y = torch.tensor(np.stack(made), dtype=torch.float32), torch.tensor(6 * kept["digit"].astype(int) + speakers)
    test = torch.from_numpy(kept["take"] < 5)
    x = (x - x[~test].mean(0)) / x[~test].std(0)
    return TensorDataset(x[~test], y[~test]), TensorDataset(x[test], y[test])


def acoustic() -> Net:
    """A perceptron of two hidden layers of 512 units on log-mel features of spoken digits."""
    train, test = spoken()
    wide = train.tensors[0].shape[1] * train.tensors[0].shape[2]

    def untrained(seed: int) -> Model:
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(wide, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 60)
        )
        return Model(net.eval(), example=(torch.zeros(1, *train.tensors[0].shape[1:]),), task=Classification())

    def bench(seed: int) -> Bench:
        return Bench(train=train, test=test, training=Training(batch_size=64, optimizer=Adam(lr=3e-4)), seed=seed)

    return Net(
        name="acoustic",
        about="a perceptron (512 and 512 units) on spoken digits, 60 classes of digit and speaker: trained for 15 "
        "passes (Adam, rate 0.001), then 2 passes at 0.0003; 300 test recordings",
        ways=of_layers(),
        bench=bench,
        passes=2,
        untrained=untrained,
        training=Training(epochs=15, batch_size=64, optimizer=Adam(lr=1e-3), schedule=Cosine()),
        score=right,
    )


class WordLstm(nn.Module):
    """The next word from ten words before it."""

    def __init__(self, words: int, embedded: int = EMBEDDED, cells: int = CELLS) -> None:
        super().__init__()
        self.words = nn.Embedding(words, embedded)
        self.cells = nn.LSTM(embedded, cells, batch_first=True)
        self.head = nn.Linear(cells, words)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, context: Tensor) -> Tensor:
        """Scores of all words."""
        return self.head(self.cells(self.words(context))[0][:, -1])


def windows(text: Tensor, step: int) -> TensorDataset:
    """Every so many words of a text: the words before one, and that one."""
    found = text.unfold(0, CONTEXT + 1, step)
    return TensorDataset(found[:, :-1].contiguous(), found[:, -1].contiguous())


def words() -> Net:
    """An LSTM of 128 cells on WikiText-2's validation text, judged on its test text."""
    train, test, vocabulary = corpus()

    def untrained(seed: int) -> Model:
        torch.manual_seed(seed)
        example = (torch.zeros(1, CONTEXT, dtype=torch.long),)
        return Model(WordLstm(vocabulary).eval(), example=example, task=Classification())

    def bench(seed: int) -> Bench:
        training = Training(batch_size=256, optimizer=Adam(lr=1e-4), schedule=Cosine())
        return Bench(train=windows(train[4:], 8), test=windows(test, 40), training=training, seed=seed)

    return Net(
        name="words",
        about=f"an LSTM of {CELLS} cells over {vocabulary:,} words of WikiText-2's validation text (its test text "
        "judges): every eighth word to predict, trained for 4 passes (Adam, rate 0.004), then 1 pass at 0.0001 over "
        "as many other words",
        ways=of_words(),
        bench=bench,
        passes=1,
        untrained=untrained,
        training=Training(epochs=4, batch_size=256, optimizer=Adam(lr=4e-3), schedule=Cosine()),
        first=windows(train, 8),
        score=perplexity,
        unit="perplexity",
    )

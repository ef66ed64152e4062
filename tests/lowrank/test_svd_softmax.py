"""SVD-Softmax (survey 25): which layer it takes, how it tunes, and what the paper shows on a language model."""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import replace
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.errors import NeedError, SettingError
from karui.layers.svd_softmax import SvdSoftmaxHead, operations
from karui.lowrank.svd_softmax import SvdSoftmax, agreed, tune
from karui.measuring import count, onnx_form
from karui.model import Classification, Model, Regression
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

pytestmark = pytest.mark.paper(25)


class WordModel(nn.Module):
    """The next word from the two before it."""

    def __init__(self, words: int, width: int = 64, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.hidden = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, words)
        # Language models start their output layer small: rows of words not yet met are then no noise.
        nn.init.normal_(self.head.weight, std=0.02)
        if tied:
            self.words.weight = self.head.weight

    def forward(self, context: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.words(context).flatten(-2))))


def decayed(model: WordModel, words: int) -> None:
    """A head with a decaying spectrum, as trained ones have."""
    with torch.no_grad():
        width = model.head.in_features
        basis = torch.linalg.qr(torch.randn(width, width)).Q
        model.head.weight.copy_(torch.randn(words, width) * torch.arange(1, width + 1) ** -1.0 @ basis)


@pytest.fixture
def words() -> Model:
    torch.manual_seed(0)
    net = WordModel(900, 32)
    decayed(net, 900)
    return Model(net.eval(), example=(torch.zeros(1, 2, dtype=torch.long),), task=Classification())


def contexts(number: int, words: int = 900) -> Tensor:
    return torch.randint(0, words, (number, 2), generator=torch.Generator().manual_seed(5))


def run(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(x)


def test_the_output_layer_is_found_and_replaced_and_nothing_else_changes(words: Model) -> None:
    before = copy.deepcopy(words.module.state_dict())
    light = SvdSoftmax().apply(words, Bench())
    head: Any = light.module.get_submodule("head")
    assert isinstance(head, SvdSoftmaxHead)
    assert (head.window, head.full_view) == (4, 27)
    x = contexts(20)
    logits, exact = run(light, x), run(words, x)
    assert logits.shape == exact.shape
    assert int(torch.isclose(logits, exact, atol=1e-4).sum(1).min()) >= 27
    assert all(torch.equal(value, before[name]) for name, value in words.module.state_dict().items())
    note: Any = light.lineage[-1]
    assert note.settings["macs"] == [900 * 32, operations(900, 32, 4, 27)]
    assert light.lineage[-2].kind == "replace"
    assert count(words).macs - count(light).macs == note.settings["macs"][0] - note.settings["macs"][1]


def test_window_of_one_is_exact(words: Model) -> None:
    x = contexts(20)
    for layer in ("", "head"):
        torch.testing.assert_close(run(SvdSoftmax(window=1.0, layer=layer).apply(words, Bench()), x), run(words, x))


def test_a_head_that_does_not_pay_is_left_unless_it_is_named() -> None:
    model = Model(WordModel(30, 32), example=(torch.zeros(1, 2, dtype=torch.long),))
    light = SvdSoftmax().apply(model, Bench())
    assert light.module is model.module
    assert "nothing replaced" in light.lineage[-1].describe()
    assert "would not save" in SvdSoftmax().remarks(model)[0]
    named = SvdSoftmax(layer="head").apply(model, Bench())
    assert isinstance(named.module.get_submodule("head"), SvdSoftmaxHead)


def test_a_budget_is_offered_the_heads_that_halve_the_work(words: Model) -> None:
    offered = list(SvdSoftmax().candidates(words, Bench()))
    assert [(one.place, one.text) for one in offered] == [
        ("head", "window 8 of 32, full view 27 of 900"), ("head", "window 4 of 32, full view 27 of 900"),
    ]  # fmt: skip
    for one in offered:
        assert one.layers is not None
        (head,) = one.layers().values()
        light = one.technique.apply(words, Bench())
        assert 2 * count(Model(head, example=(torch.zeros(1, 32),))).macs < 900 * 32
        state = light.module.get_submodule("head").state_dict()
        assert all(torch.equal(value, state[name]) for name, value in head.state_dict().items())
        assert torch.equal(light.module.get_submodule("hidden").weight, words.module.get_submodule("hidden").weight)  # pyright: ignore
    few = Model(nn.Linear(32, 10), example=(torch.zeros(1, 32),), task=Classification())
    assert list(SvdSoftmax().candidates(few, Bench())) == []
    assert list(SvdSoftmax().candidates(replace(words, task=Regression()), Bench())) == []


def test_only_an_output_layer_is_taken(words: Model) -> None:
    wide = nn.Sequential(nn.Linear(16, 4000), nn.ReLU(), nn.Flatten(0), nn.Unflatten(0, (1, -1)))
    inner = nn.Sequential(nn.Linear(16, 4000), nn.ReLU(), nn.Unflatten(1, (40, 100)), nn.Conv1d(40, 3, 1))
    assert (
        "nothing replaced" not in SvdSoftmax().apply(Model(wide, (torch.zeros(1, 16),)), Bench()).lineage[-1].describe()
    )
    told = SvdSoftmax().apply(Model(inner, (torch.zeros(1, 16),)), Bench()).lineage[-1].describe()
    assert "does not give the model's output" in told
    regression = replace(words, task=Regression())
    assert "regression" in SvdSoftmax().remarks(regression)[0]
    with pytest.raises(SettingError, match="'words', which cannot be"):
        SvdSoftmax(layer="words").apply(words, Bench())
    with pytest.raises(SettingError, match="haed"):
        SvdSoftmax(layer="haed").apply(words, Bench())


def test_a_tied_head_keeps_its_embedding() -> None:
    torch.manual_seed(0)
    model = Model(WordModel(900, 32, tied=True), example=(torch.zeros(1, 2, dtype=torch.long),))
    light = SvdSoftmax(window=0.5, full_view=1.0, layer="head").apply(model, Bench())
    x = contexts(10)
    torch.testing.assert_close(run(light, x), run(model, x), rtol=1e-4, atol=1e-4)
    assert light.parameters == model.parameters + 900 * 32 + 32 * 32


def test_the_tuner_gives_the_cheapest_pair_that_reaches_the_target(words: Model) -> None:
    layer: Any = words.module.get_submodule("head")
    hidden = torch.randn(400, 32, generator=torch.Generator().manual_seed(3))
    costs = []
    for target in (0.5, 0.9, 0.99, 1.0):
        window, full_view, agreement = tune(layer, hidden, target, top=3)
        head = SvdSoftmaxHead.from_linear(layer, window, full_view).eval()
        with torch.no_grad():
            measured = agreed(layer(hidden).topk(3).indices, head(hidden).topk(3).indices)
        assert agreement == pytest.approx(measured, abs=0.002)
        assert agreement >= target
        costs.append(operations(900, 32, window, full_view))
    assert costs == sorted(costs)
    assert costs[0] < costs[2]


def test_the_tuner_looks_at_calibration_inputs(words: Model) -> None:
    with pytest.raises(NeedError, match="calibration"):
        SvdSoftmax(target=0.9).apply(words, Bench())
    data = TensorDataset(contexts(300), torch.zeros(300, dtype=torch.long))
    light = SvdSoftmax(target=0.95, top=2, samples=200).apply(words, Bench(train=data))
    note: Any = light.lineage[-1]
    assert note.settings["agreement"] >= 0.95
    assert note.settings["samples"] == 200
    x = contexts(300)
    assert agreed(run(words, x).topk(2).indices, run(light, x).topk(2).indices) > 0.9


def test_onnx_runtime_computes_the_same_at_any_batch_size(words: Model) -> None:
    light = SvdSoftmax(window=0.25, full_view=0.05).apply(words, Bench())
    session = onnxruntime.InferenceSession(onnx_form(light).data, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        x = contexts(batch)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(logits, run(light, x).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"window": 0.0}, "window"), ({"window": 1.1}, "window"), ({"full_view": 0.0}, "full_view"),
        ({"target": 1.5}, "target"), ({"top": 0}, "top"), ({"samples": 0}, "samples"),
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        SvdSoftmax(**settings)


def corpus() -> tuple[Tensor, int]:
    """The text that every Python carries, its language reference, as word numbers."""
    text = " ".join(topics[name] for name in sorted(topics)).lower()
    tokens = re.findall(r"[a-z_]+|[^\sa-z_]", text)
    rank = {word: number for number, (word, _) in enumerate(Counter(tokens).most_common())}
    return torch.tensor([rank[word] for word in tokens]), len(rank)


@pytest.mark.effect
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_third_of_the_multiply_adds_keeps_the_answers_of_a_language_model(seed: int) -> None:
    """A quarter of the width as window, and 8 % of 3,408 words in full view: a generous share, at a third of the work.

    Agreement is an easy score here: over 2,300 held-out positions the model puts 32 to 37 different words first, and
    about 160 among the first ten (its perplexity is 88; that of word frequencies alone, 210). A random basis agrees on
    99.9 % of the best words, and is worse in perplexity only. The output layer starts small (standard deviation 0.02).
    """
    numbers, vocabulary = corpus()
    assert vocabulary >= 3000
    context, target = torch.stack([numbers[:-2], numbers[1:-1]], dim=1), numbers[2:]
    held = torch.arange(len(target)) % 50 == 0
    torch.manual_seed(seed)
    fresh = Model(WordModel(vocabulary), example=(context[:1],), task=Classification())
    bench = Bench(
        train=TensorDataset(context[~held], target[~held]),
        validation=TensorDataset(context[held], target[held]),
        training=Training(epochs=1, batch_size=512, optimizer=Adam(lr=4e-3), schedule=Cosine()),
        seed=seed,
    )
    model = bench.fit(fresh)
    model.module.eval()
    layer: Any = model.module.get_submodule("head")
    with torch.no_grad():
        trunk: Any = model.module
        hidden = torch.tanh(trunk.hidden(trunk.words(context[held]).flatten(-2)))
        exact = layer(hidden)
        best = exact.topk(10).indices

        def judge(head: SvdSoftmaxHead) -> tuple[float, float, float]:
            logits = head(hidden)
            loss = nn.functional.cross_entropy
            risen = float(loss(logits, target[held]) - loss(exact, target[held]))
            return agreed(best[:, :1], logits.topk(1).indices), agreed(best, logits.topk(10).indices), abs(risen)

        light = SvdSoftmax(window=0.25, full_view=0.08).apply(model, bench).module.get_submodule("head")
        assert isinstance(light, SvdSoftmaxHead)
        assert operations(vocabulary, 64, light.window, light.full_view) <= 0.35 * vocabulary * 64
        first, ten, risen = judge(light)
        assert first >= 0.97
        assert ten >= 0.95
        assert risen < 0.01  # perplexity within 1 %
        preview_only = judge(SvdSoftmaxHead.from_linear(layer, light.window, 0).eval())
        basis = torch.linalg.qr(torch.randn(64, 64)).Q
        random = judge(SvdSoftmaxHead.from_linear(layer, light.window, light.full_view, basis).eval())
    assert preview_only[0] < first - 0.05
    assert preview_only[1] < ten - 0.05
    assert min(preview_only[2], random[2]) > 5 * risen

"""SVD-Softmax (survey 25): agreement with the exact output layer on a word model, and time at large vocabularies.

The word model (two words of context) is trained on the validation part of WikiText-2 and judged on its test part, with
the words that occur twice and more; the train part is not at hand, so no perplexity here compares with a published one.
So little text makes a weak model: it offers few different words as its best, and agreeing with it on those is easy. How
few, and its perplexity beside that of the words' frequencies alone, is part of the results. The output layer starts
small (standard deviation 0.02), so that rows of words that were rarely met are no noise.

Times are for a hidden width of 512 and weights with a decaying spectrum drawn at random. Three seeds.
"""

from __future__ import annotations

import gzip
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from _common import CACHE, Ledger, claims_table, data_folder, interval, publish, shown, table, unseen
from _layers import against, race
from karui.layers.svd_softmax import SvdSoftmaxHead, operations
from karui.lowrank.svd_softmax import agreed
from karui.measuring import Clock, OnnxRuntime, Torch, time_ratio
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import Adam, Training

SEEDS, WIDTH, EPOCHS = 3, 64, 2
WIDE = 512
"""Hidden width of the timed layers."""
SIZES = ((8, 0.03), (16, 0.0), (16, 0.03), (16, 0.05), (16, 0.08), (16, 0.1))
TIMED = ((50_000, 32, 0.01), (50_000, 64, 0.01), (50_000, 128, 0.01), (50_000, 64, 0.05), (100_000, 64, 0.01))


def corpus(least: int = 2) -> tuple[Tensor, Tensor, int]:
    """Word numbers of the two texts, and the number of words: those that the first holds so many times or more."""

    def words(part: str) -> list[str]:
        with gzip.open(data_folder() / "texts" / f"wikitext2_{part}.txt.gz", "rt", encoding="utf-8") as file:
            return file.read().replace("\n", " <eos> ").split()

    train, test = words("valid"), words("test")
    known = [word for word, times in Counter(train).most_common() if times >= least]
    number = {word: i for i, word in enumerate(known)}
    unknown = number["<unk>"]
    return *(torch.tensor([number.get(word, unknown) for word in text]) for text in (train, test)), len(known)


class WordModel(nn.Module):
    """The next word from the two before it."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, WIDTH)
        self.hidden = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, words)
        nn.init.normal_(self.head.weight, std=0.02)

    def features(self, context: Tensor) -> Tensor:
        """What the output layer is given."""
        return torch.tanh(self.hidden(self.words(context).flatten(-2)))

    def forward(self, context: Tensor) -> Tensor:
        """Scores of all words."""
        return self.head(self.features(context))


def pairs(text: Tensor) -> TensorDataset:
    return TensorDataset(torch.stack([text[:-2], text[1:-1]], dim=1), text[2:])


def one_seed(seed: int) -> dict[str, Any]:
    train, test, vocabulary = corpus()
    torch.manual_seed(seed)
    net = WordModel(vocabulary)
    data = pairs(train)
    training = Training(epochs=EPOCHS, batch_size=512, optimizer=Adam(lr=4e-3))
    bench = Bench(train=data, training=training, seed=seed)
    model = bench.fit(Model(net, example=(torch.zeros(1, 2, dtype=torch.long),), task=Classification()))
    trained: Any = model.module.eval()
    every = torch.arange(len(test) - 2) % 20 == 0
    context, target = (part[every] for part in pairs(test).tensors)
    with torch.no_grad():
        hidden = trained.features(context)
        exact = trained.head(hidden)
        told: dict[str, Any] = {"words": vocabulary, "model": described(exact, target, train, vocabulary)}
        for window, share in SIZES:
            full_view = round(share * vocabulary)
            head = SvdSoftmaxHead.from_linear(trained.head, window, full_view).eval()
            told[f"{window}, {share:.0%}"] = judged(head, hidden, exact, target)
        basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
        head = SvdSoftmaxHead.from_linear(trained.head, 16, round(0.05 * vocabulary), basis).eval()
        told["random basis"] = judged(head, hidden, exact, target)
    return told


def described(exact: Tensor, target: Tensor, train: Tensor, vocabulary: int) -> dict[str, float]:
    """How good the model is beside word frequencies (each counted once more), and how few words it ever puts first."""
    frequencies = (torch.bincount(train, minlength=vocabulary) + 1.0).log()
    loss = nn.functional.cross_entropy
    return {
        "perplexity": float(loss(exact, target).exp()),
        "perplexity of word frequencies": float(loss(frequencies.expand(len(target), -1), target).exp()),
        "positions": len(target),
        "different words in the top 1": len(exact.argmax(1).unique()),
        "different words in the top 10": len(exact.topk(10).indices.unique()),
    }


def judged(head: SvdSoftmaxHead, hidden: Tensor, exact: Tensor, target: Tensor) -> dict[str, float]:
    logits, best = head(hidden), exact.topk(10).indices
    loss = nn.functional.cross_entropy
    return {
        "multiply-adds": 100
        * operations(*exact.shape[1:], WIDTH, head.window, head.full_view)
        / (exact.shape[1] * WIDTH),
        "top-1": 100 * agreed(best[:, :1], logits.topk(1).indices),
        "top-10": 100 * agreed(best, logits.topk(10).indices),
        "perplexity": 100 * (float((loss(logits, target) - loss(exact, target)).exp()) - 1),
    }


def heads(words: int, window: int, share: float) -> tuple[nn.Module, nn.Module]:
    """Logits and softmax of a plain output layer with random weights of a decaying spectrum, and with a preview."""
    layer = nn.Linear(WIDE, words)
    with torch.no_grad():
        layer.weight.mul_(torch.arange(1, WIDE + 1) ** -0.5)
    head = SvdSoftmaxHead.from_linear(layer, window, round(share * words))
    return nn.Sequential(layer, nn.Softmax(-1)).eval(), nn.Sequential(head, nn.Softmax(-1)).eval()


def raced(words: int, window: int, share: float) -> dict[str, Any]:
    """One vector: the better of both engines with the preview against the better of both without."""
    dense, light = heads(words, window, share)
    sides = {f"previewed, {engine.name}": (engine, light) for engine in (Torch(), OnnxRuntime())}
    best, times = race(dense, sides, torch.randn(1, WIDE))
    ratio = against(times, best, min(sides, key=lambda name: times[name].median))
    return {"best": best, "ratio": ratio.value, "verdict": ratio.verdict}


def timed(words: int, window: int, share: float) -> dict[str, str]:
    """Against the plain layer, in turns, for one vector and for sixteen."""
    example = (torch.randn(1, WIDE),)
    dense, light = (Model(one, example=example) for one in heads(words, window, share))
    clock = Clock(batches=(1, 16), threads=(1,), engines=(Torch(), OnnxRuntime()), cpu_time=True)
    found = clock.time({"dense": dense, "light": light})
    sides = zip(found.of("dense"), found.of("light"), strict=True)
    return {f"{heavy.engine}, batch {heavy.batch}": time_ratio(heavy, lean).verdict for heavy, lean in sides}


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    run, model = told["runs"]["16, 5%"], told["model"]
    times = told["times"]["50,000 words, window 64, 1%"]
    lines = [
        (
            "WikiText-2, a word model of width 64, 3 seeds, window 16, 5 % in full view: "
            f"{run['multiply-adds']['mean']:.0f} % of the multiply-adds, top-1 agreement "
            f"{shown(run['top-1'])} %, perplexity +{shown(run['perplexity'])} %"
        ),
        (
            f"agreement is easy there: {model['different words in the top 1']['mean']:.0f} different words are ever "
            f"first; perplexity {model['perplexity']['mean']:.0f}, word frequencies alone "
            f"{model['perplexity of word frequencies']['mean']:.0f}"
        ),
        (
            "50,000 words, width 512, window 64, 1 % in full view, one thread: "
            f"{'; '.join(f'{name} {verdict}' for name, verdict in times.items())}"
        ),
    ]
    return {"svd_softmax": lines + unseen(told["claims"])}


def main() -> None:
    torch.set_num_threads(1)
    data_folder()
    ledger = Ledger(CACHE / "svd_softmax.json")
    seeds = [ledger.once(f"seed {seed}", lambda seed=seed: one_seed(seed)) for seed in range(SEEDS)]
    clocks = {
        f"{words:,} words, window {window}, {share:.0%}": ledger.once(
            f"time {words} {window} {share}", lambda w=words, k=window, s=share: timed(w, k, s)
        )
        for words, window, share in TIMED
    }
    names = [*(f"{window}, {share:.0%}" for window, share in SIZES), "random basis"]
    keys = ("multiply-adds", "top-1", "top-10", "perplexity")
    found = {name: {key: interval([told[name][key] for told in seeds]) for key in keys} for name in names}
    best, preview = found["16, 5%"], found["16, 0%"]
    model = {key: interval([told["model"][key] for told in seeds]) for key in seeds[0]["model"]}
    claims = {
        "top-1 of 97 % and top-10 of 95 % at 35 % of the multiply-adds": best["top-1"]["mean"] >= 97
        and best["top-10"]["mean"] >= 95
        and best["multiply-adds"]["mean"] <= 35,
        "perplexity within 1 %": abs(best["perplexity"]["mean"]) <= 1,
        "the preview alone is clearly worse": preview["top-1"]["high"] < best["top-1"]["low"],
        "a random basis is clearly worse in perplexity (not in its best words)": found["random basis"]["perplexity"][
            "low"
        ]
        > best["perplexity"]["high"],
    }
    head = ["window, full view", "multiply-adds, %", "top-1 agreement, %", "top-10 recall, %", "perplexity, +%"]
    engines = list(next(iter(clocks.values())))
    parts = [
        "# SVD-Softmax (25)",
        (
            f"WikiText-2, {seeds[0]['words']:,} words, width {WIDTH}, {SEEDS} seeds, mean and 95 % interval. "
            "The random basis is at window 16 and 5 % in full view."
        ),
        (
            "Agreement is an easy score here: over "
            f"{model['positions']['mean']:,.0f} positions of the test text the model puts only "
            f"{shown(model['different words in the top 1'])} different words first, and "
            f"{shown(model['different words in the top 10'])} among the first ten. Its perplexity is "
            f"{shown(model['perplexity'])}, that of the words' frequencies alone "
            f"{shown(model['perplexity of word frequencies'])}. The random basis finds the best words, too, as so many "
            "are in full view; it spoils the distribution."
        ),
        table(head, [[name, *(shown(told[key]) for key in keys)] for name, told in found.items()]),
        "Output layer with softmax at width 512, one thread (processor time), in turns with the plain layer:",
        table(["", *engines], [[name, *(told.get(e, "-") for e in engines)] for name, told in clocks.items()]),
        claims_table(claims),
    ]
    values = {"model": model, "runs": found, "times": clocks, "claims": claims}
    publish("svd_softmax", values, "\n\n".join(parts), measured(values))


if __name__ == "__main__":
    main()

"""Low-rank output layers (survey 23): a word model, and a thousand classes of three digits.

The word model (two words of context, 128 hidden units) is trained on the validation part of WikiText-2 and judged on
its test part, over the words that occur eight times and more; no perplexity here compares with a published one. Its
output layer is whole, or factored before training at a quarter and an eighth of the hidden width, and at rank 2. The
time of a step is processor time, whole and factored in turns.

Three digits side by side, and their number from 0 to 999: the output layer factored, or a hidden layer at as many
parameters. Three seeds of both.
"""

from __future__ import annotations

from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from _common import CACHE, Ledger, claims_table, data_folder, publish, table, unseen
from _over_seeds import Run, bench_of, over_seeds, percent, right, sentence, whole
from karui.data import Splits, load_data
from karui.layers.factored import FactoredLinear
from karui.lowrank import LowRankOutput
from karui.model import Classification, Model, replace_layers
from karui.technique import Bench
from svd_softmax import corpus, pairs

EMBEDDED, HIDDEN, EPOCHS, TRIPLE_EPOCHS, STEPS = 64, 128, 2, 8, 12
LEAST = 8
RANKS = {"rank 32 (a quarter)": 32, "rank 16 (an eighth)": 16, "rank 2": 2}
TRIPLES = "triples, whole"
OUTPUT, LARGER, INNER = "triples, output of rank 64", "triples, output of rank 165", "triples, hidden layer of rank 32"


class WordModel(nn.Module):
    """The next word from the two before it."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, EMBEDDED)
        self.hidden = nn.Linear(2 * EMBEDDED, HIDDEN)
        self.head = nn.Linear(HIDDEN, words)

    def forward(self, context: Tensor) -> Tensor:
        """Scores of all words."""
        return self.head(torch.tanh(self.hidden(self.words(context).flatten(-2))))


def word_model(words: int, seed: int) -> Model:
    torch.manual_seed(seed)
    return Model(WordModel(words).eval(), example=(torch.zeros(1, 2, dtype=torch.long),), task=Classification())


def words_seed(seed: int) -> Run:
    train, test, words = corpus(LEAST)
    data = Splits(train=pairs(train), validation=pairs(test), test=pairs(test), classes=(), name="words")
    bench, model = bench_of(data, seed, EPOCHS, lr=3e-3, batch=512), word_model(words, seed)
    ledger = Ledger(CACHE / "low_rank_output_words.json")

    def one(rank: int) -> dict[str, float]:
        trained = LowRankOutput(rank=rank, epochs=EPOCHS).apply(model, bench) if rank else bench.fit(model)
        return described(trained, test)

    ranks = {"whole": 0, **RANKS}
    return {way: ledger.once(f"{way}, seed {seed}", lambda rank=rank: one(rank)) for way, rank in ranks.items()}


def described(model: Model, test: Tensor) -> dict[str, float]:
    """Parameters, and perplexity on every fifth word of the test text."""
    context, target = (part[::5] for part in pairs(test).tensors)
    net: Any = model.module.eval()
    with torch.no_grad():
        parts = zip(context.split(512), target.split(512), strict=True)
        lost = sum(float(nn.functional.cross_entropy(net(x), y, reduction="sum")) for x, y in parts)
    return {"perplexity": float(torch.tensor(lost / len(target)).exp()), "parameters": model.parameters}


def step_times() -> dict[str, float]:
    """Median seconds of a training step of 512 samples, in turns."""
    train, _, words = corpus(LEAST)
    context, target = (part[:512] for part in pairs(train).tensors)
    whole_model = word_model(words, 0)
    nets = {"whole": whole_model.module.train()}
    for name, rank in RANKS.items():
        nets[name] = LowRankOutput(rank=rank, epochs=0).apply(whole_model, Bench()).module.train()
    optimizers = {name: torch.optim.Adam(net.parameters()) for name, net in nets.items()}
    spent: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(STEPS):
        for name, net in nets.items():
            start = process_time()
            optimizers[name].zero_grad()
            nn.functional.cross_entropy(net(context), target).backward()
            optimizers[name].step()
            spent[name].append(process_time() - start)
    return {name: median(times[2:]) for name, times in spent.items()}


def triples(data: Any, number: int, seed: int) -> TensorDataset:
    """Three digits side by side, and their number: a thousand targets that have much in common."""
    pictures = torch.stack([data[i][0].flatten() for i in range(len(data))])
    labels = torch.tensor([int(data[i][1]) for i in range(len(data))])
    drawn = torch.randint(0, len(labels), (number, 3), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(pictures[drawn].flatten(1), (labels[drawn] * torch.tensor([100, 10, 1])).sum(1))


def triples_seed(seed: int) -> Run:
    digits = load_data("digits")
    test = triples(digits.test, 3000, 1)
    data = Splits(train=triples(digits.train, 15_000, 0), validation=test, test=test, classes=(), name="triples")
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1000))
    model = Model(net.eval(), example=(torch.zeros(1, 192),), task=Classification())
    bench = bench_of(data, seed, TRIPLE_EPOCHS, lr=4e-3, batch=128)
    lights = {
        TRIPLES: bench.fit(model),
        OUTPUT: LowRankOutput(rank=64, epochs=TRIPLE_EPOCHS).apply(model, bench),
        LARGER: LowRankOutput(rank=165, epochs=TRIPLE_EPOCHS).apply(model, bench),
        INNER: bench.fit(replace_layers(model, {"2": FactoredLinear(256, 32, 256)})),
    }
    return {name: {"accuracy": right(bench, light), "parameters": light.parameters} for name, light in lights.items()}


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    runs, times = told["words"], told["times"]
    sizes = sentence(runs, "parameters", whole, list(runs))
    faster = "; ".join(f"{name} {times['whole'] / times[name]:.2f} times" for name in RANKS)
    lines = [
        (
            f"WikiText-2, a word model of {told['vocabulary']:,} words, 3 seeds, perplexity: "
            f"{sentence(runs, 'perplexity', percent, list(runs))}; parameters: {sizes}"
        ),
        f"a training step is faster, one thread: {faster}",
        (
            f"a thousand classes of three digits, 3 seeds, accuracy in %: "
            f"{sentence(told['triples'], 'accuracy', percent, list(told['triples']))}"
        ),
    ]
    return {"low_rank_output": lines + unseen(told["claims"])}


def main() -> None:
    data_folder()
    words, digits = (
        over_seeds("low_rank_output", words_seed),
        over_seeds("low_rank_output", triples_seed, part="triples"),
    )
    times = Ledger(CACHE / "low_rank_output.json").once("times", step_times)
    (quarter, eighth, two), vocabulary = RANKS, corpus(LEAST)[2]
    size, lost = words.mean("whole", "parameters"), words.mean("whole", "perplexity")
    claims = {
        "a quarter or an eighth of the width as rank: perplexity within 3 %, 30 % fewer parameters in all": any(
            words.mean(way, "perplexity") <= 1.03 * lost and words.mean(way, "parameters") <= 0.7 * size
            for way in (quarter, eighth)
        ),
        "a training step takes less time at both": all(times[way] < times["whole"] for way in (quarter, eighth)),
        "rank 2 is clearly worse (10 % in perplexity)": words.mean(two, "perplexity") > 1.1 * lost,
        "a thousand classes: rank 64 within 1 point of the whole layer": digits.mean(OUTPUT)
        >= digits.mean(TRIPLES) - 1,
        "factoring a hidden layer at as many parameters is not better": digits.mean(INNER) <= digits.mean(LARGER),
    }
    spent = [[name, f"{1e3 * one:.1f}", f"{times['whole'] / one:.2f}"] for name, one in times.items()]
    text = f"""# Low-rank output layers (23)

WikiText-2, {vocabulary:,} words, {HIDDEN} hidden units, {EPOCHS} epochs, {len(words.seeds)} seeds, mean and 95 %
interval.

{words.table({"perplexity": ("perplexity", percent), "parameters": ("parameters", whole)})}

A training step of 512 samples, one thread, processor time, medians in turns:

{table(["", "ms", "times faster"], spent)}

A thousand classes of three digits, {TRIPLE_EPOCHS} epochs:

{digits.table({"accuracy": ("test accuracy, %", percent), "parameters": ("parameters", whole)})}

{claims_table(claims)}
"""
    values = {
        "vocabulary": vocabulary,
        "words": words.told(),
        "times": times,
        "triples": digits.told(),
        "claims": claims,
    }
    publish("low_rank_output", values, text, measured(values))


if __name__ == "__main__":
    main()

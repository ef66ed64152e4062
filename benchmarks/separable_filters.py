"""Separable filters (survey 14): a bank of oriented filters as mixtures of fewer separable ones, three ways.

48 oriented filters of 9x9 (twelve angles, two phases, two scales, shaken by the seed), three seeds: relative errors of
the bank, and how far features of digits (enlarged three times) that the separable filters give agree with the bank's
own. Beside the three methods, each filter cut to rank one alone, which takes as many separable filters as the bank has.
The time of the bank is that of a layer on one picture of 64x64, one thread, processor time, in turns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from _common import CACHE, Ledger, claims_table, publish, table, unseen
from _over_seeds import Run, over_seeds, sentence, small
from karui.data import load_data
from karui.layers.separable_bank import separable_bank
from karui.measuring import Clock, OnnxRuntime, Torch, time_ratio
from karui.model import Model
from karui.numerics.separable import Mixture, by_nuclear_norm, mixed, rank_one, spread
from karui.numerics.separable_cp import by_tensor
from karui.numerics.sparse_coding import learn_filters

SIZE, BANK = 9, 48
ALONE = "each filter at rank 1, 48 separable"
TD, COMB, DIRECT = (f"{method}, 16 separable" for method in ("td", "comb", "direct"))
MORE = "td, 24 separable"


def gabors(seed: int) -> Tensor:
    """Oriented filters of mean 0 and norm 1."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(SIZE, dtype=torch.float64) - SIZE // 2
    down, across = torch.meshgrid(places, places, indexing="ij")
    made = []
    for number in range(BANK):
        shake = torch.rand(2, generator=generator).tolist()
        angle = math.pi * (number % 12) / 12 + 0.1 * shake[0]
        scale = (1.6, 2.2)[number // 24] * (1 + 0.1 * shake[1])
        along = across * math.cos(angle) + down * math.sin(angle)
        beside = down * math.cos(angle) - across * math.sin(angle)
        wave = torch.cos(math.pi / 2 * along / scale + math.pi / 2 * (number // 12 % 2))
        one = torch.exp(-(along**2 + beside**2 / 2) / (2 * scale**2)) * wave
        made.append((one - one.mean()) / (one - one.mean()).norm())
    return torch.stack(made)


def layer_of(bank: Tensor, found: Mixture | None = None) -> nn.Module:
    """The bank as a layer; by the separable filters if they are given."""
    conv = nn.Conv2d(1, len(bank), (SIZE, SIZE), bias=False)
    with torch.no_grad():
        conv.weight.copy_(bank.unsqueeze(1))
    if found is None:
        return conv.eval()
    return separable_bank(conv, [one.unsqueeze(0) for one in found.factors], found.mix.unsqueeze(1)).eval()


def one_seed(seed: int) -> Run:
    data, bank = load_data("digits"), gabors(seed)
    pictures = torch.stack([data.train[i][0] for i in range(80)])
    pictures = nn.functional.interpolate(pictures, scale_factor=3, mode="bicubic")
    learned = learn_filters(pictures[:, 0], 16, (SIZE, SIZE), flatness=0.1, rounds=15, seed=seed)
    values = torch.linalg.svdvals(bank).square()
    told: Run = {ALONE: {"error": float((1 - values[:, 0].sum() / values.sum()).sqrt())}}
    with torch.no_grad():
        wanted = layer_of(bank)(pictures).flatten()
        for name, found in {
            TD: by_tensor(bank, 16),
            MORE: by_tensor(bank, 24),
            COMB: by_nuclear_norm(bank, 16),
            DIRECT: mixed(bank, rank_one(learned)),
        }.items():
            seen = layer_of(bank, found)(pictures).flatten()
            told[name] = {
                "error": found.error,
                "agreement": float(torch.corrcoef(torch.stack([seen, wanted]))[0, 1]),
                "second value": float(spread(found.filters()).max()),
            }
    return told


def timed() -> dict[str, str]:
    """The bank by 16 separable filters against the bank, in both engines."""
    bank, example = gabors(0), (torch.randn(1, 1, 64, 64),)
    sides = {"bank": layer_of(bank), "separable": layer_of(bank, by_tensor(bank, 16))}
    models = {name: Model(layer, example=example) for name, layer in sides.items()}
    clock = Clock(batches=(1,), threads=(1,), engines=(Torch(), OnnxRuntime()), cpu_time=True)
    found = clock.time(models)
    pairs = zip(found.of("bank"), found.of("separable"), strict=True)
    return {whole.engine: time_ratio(whole, light).verdict for whole, light in pairs}


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    runs, ways = told["runs"], (TD, COMB, DIRECT)
    lines = [
        f"a bank of 48 oriented 9x9 filters, 3 seeds, relative error: {sentence(runs, 'error', small, (ALONE, *ways))}",
        f"features of digits, correlation with the bank's own: {sentence(runs, 'agreement', small, ways)}",
        "the bank by 16 separable filters, a picture of 64x64, one thread: "
        + "; ".join(f"{engine} {verdict}" for engine, verdict in told["times"].items()),
    ]
    return {"separable_filters": lines + unseen(told["claims"])}


def main() -> None:
    runs = over_seeds("separable_filters", one_seed)
    times = Ledger(CACHE / "separable_filters.json").once("times", timed)
    told = runs.told()
    claims = {
        "a third of the filters (td) has less than 0.3 of the error of each filter cut alone, every seed": runs.always(
            TD, ALONE, "error", 0.3
        ),
        "td no worse than comb, every seed": all(run[TD]["error"] <= run[COMB]["error"] for run in runs.seeds),
        "comb no worse than direct, every seed": all(run[COMB]["error"] <= run[DIRECT]["error"] for run in runs.seeds),
        "features agree: correlation over 0.98 (td), every seed": all(
            run[TD]["agreement"] > 0.98 for run in runs.seeds
        ),
        "the separable filters are of rank one (second singular value under 1e-6 of the first)": all(
            run[way]["second value"] < 1e-6 for run in runs.seeds for way in (TD, MORE, COMB, DIRECT)
        ),
    }
    columns = {"error": ("relative error of the bank", small), "agreement": ("correlation of features", small)}
    macs = BANK * SIZE**2, 16 * 2 * SIZE + 16 * BANK
    text = f"""# Separable filters (14)

{BANK} oriented filters of {SIZE}x{SIZE}, {len(runs.seeds)} seeds, mean and 95 % interval. By tensor decomposition (td),
by the nuclear norm (comb), and learned on pictures without the bank (direct).

{runs.table(columns)}

By 16 separable filters the bank takes {macs[1]:,} multiply-adds for each pixel, {macs[0]:,} as it is. A layer on one
picture of 64x64, one thread, processor time, in turns:

{table(["engine", "time"], [[engine, verdict] for engine, verdict in times.items()])}

{claims_table(claims)}
"""
    values = {"runs": told, "times": times, "claims": claims}
    publish("separable_filters", values, text, measured(values))


if __name__ == "__main__":
    main()

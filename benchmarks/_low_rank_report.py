"""The page of `low_rank_table`: a table for each network, and which way is fastest at equal error."""

from __future__ import annotations

from typing import Any

from _common import shown, shown_times, speeds, table, where
from karui.measuring.values import bytes_text

LOSSES = (1, 2, 5, 10)
SLUGS = {
    "[11]": "svd_restructuring",
    "[12]": "tucker2",
    "[13]": "low_rank_expansion",
    "[14]": "separable_filters",
    "[15]": "flattened_conv",
    "[16]": "asymmetric_nonlinear",
    "[17]": "cp_decomposition",
    "[18] biclusters, outer products": "biclustered_cp",
    "[18] biclusters, two SVDs": "biclustered_svd",
    "[19]": "product_quantization",
    "[20] single intra-channel": "sic_layer",
    "[20] topological": "topological_conv",
    "[20] spatial bottleneck": "spatial_bottleneck",
    "[21]": "low_rank_filters",
    "[22]": "low_rank_regularization",
    "[23]": "low_rank_output",
    "[24]": "low_rank_sparse",
    "[25]": "svd_softmax",
    "[26]": "group_brain_damage",
    "[27]": "rank_constrained",
    "[28]": "compression_aware_training",
    "[29]": "lcnn",
}
KINDS = {
    "fitted": "",
    "trained": "changed while it trains",
    "taught": "layers drawn anew, then taught",
    "replaced": "layers drawn anew",  # in results kept from before they were taught
    "scratch": "from scratch",
    "inference": "for inference",
}


def page(networks: dict[str, Any]) -> str:
    """The whole page."""
    fewest = min(row["seeds"] for net in networks.values() for row in net["rows"])
    whole = len(networks) == WHOLE and not any(net["missing"] for net in networks.values())
    state = [] if whole else [UNFINISHED.format(seeds=f"{fewest} seed{'s' * (fewest != 1)}")]
    parts = ["# Low rank: every way at two and four times fewer", *state, INTRODUCTION]
    parts += ["## Which way is fastest at equal error", ANSWER, fastest(networks)]
    parts += [
        f"## {name}\n\n{net['about'][0].upper()}{net['about'][1:]}.\n\n{_net(net)}" for name, net in networks.items()
    ]
    return "\n\n".join(parts)


WHOLE = 4
UNFINISHED = """**Unfinished**: rows of {seeds} or more, as far as they have been measured; what is missing is listed
under each table."""
INTRODUCTION = """Each way is set for 2 and 4 times fewer of what its paper is about (third column; it is the nearest
setting, so that the counts tell what was reached), and judged before and after the same short training of the whole
network, at one learning rate for all: a comparison at equal effort, and not the best that each can do. The dense
network is judged after the same training too; what that loses is the training's, not the compression's. "Layers drawn
anew, then taught": papers that train whole networks from scratch, for which there is no time here. Their layers take
the places of trained ones, and each is first taught the responses of the layer that it replaces (one pass over 640
pictures without labels, all layers at once on the dense network's own inputs, which is not in the papers); "before" is
after that. What they lose says how far so short a way brings them, not what they can do. "From scratch": all weights
drawn anew, trained as long as the dense network was. "Changed while it trains": half of the passes are the technique's
own training. Mean and 95 % interval over the seeds where there are several; of the ResNets the trained weights are the
same for all seeds, which differ in what is drawn: pictures to calibrate on, starts of solvers, new layers, the order of
the training. Time is that of the dense network over the light one's in ONNX Runtime, one thread, processor time, in
turns, with its 95 % interval: above 1 is faster. Multiply-adds are those of a dense engine, which multiplies zeros.
Left out: [18] monochromatic, which acts on the first layer alone (1 % of the work of ResNet-20)."""
ANSWER = """Of the ways that lose at most so much against the dense network, before or after the short training,
whichever is better, the one with the highest ratio of times (mean over the seeds; only those whose interval lies above
1)."""


def _net(net: dict[str, Any]) -> str:
    dense = net["dense"]
    head = ["way", "", "fewer", "parameters", "million MACs", "weights file", "ONNX file"]
    head += [f"{net['unit']}, before", "after", "seeds", "batch 1", "batch 64"]
    first = ["dense", "", "", *_sizes(dense), *_scores(dense), str(dense["seeds"]), "", ""]
    rows = [
        [
            row["way"],
            KINDS[row["kind"]],
            f"{row['fewer']}x {row['of']}",
            *_sizes(row),
            *_scores(row),
            str(row["seeds"]),
            *shown_times(row["times"]),
        ]
        for row in net["rows"]
    ]
    missing = [f"Not measured yet: {', '.join(net['missing'])}."] if net["missing"] else []
    return "\n\n".join([table(head, [first, *rows]), *missing, *where(net)])


def _sizes(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['parameters']:,}",
        f"{row['macs'] / 1e6:.2f}",
        *(bytes_text(row[file]) for file in ("weights file", "onnx file")),
    ]


def _scores(row: dict[str, Any]) -> list[str]:
    return [told(row[part]) if part in row else "" for part in ("before", "after")]


def told(score: dict[str, Any]) -> str:
    """A score, with its interval if there is one."""
    return shown(score) if "low" in score else f"{score['mean']:.2f}"


def fastest(networks: dict[str, Any]) -> str:
    """For each network and each loss that may be allowed, the fastest way at each batch size."""
    rows = []
    for name, net in networks.items():
        accuracy = net["unit"].startswith("accuracy")
        for most in LOSSES:
            able = [(row, lost) for row in net["rows"] if (lost := _least_lost(row, net, accuracy=accuracy)) <= most]
            cells = [_quickest(able, batch) for batch in ("batch 1", "batch 64")]
            rows.append([name, f"{most} {'points' if accuracy else '% of perplexity'}", *cells])
    return table(["network", "at most lost", "batch 1", "batch 64"], rows)


def _quickest(able: list[tuple[dict[str, Any], float]], batch: str) -> str:
    quick = [(row, lost) for row, lost in able if row["times"][batch]["low"] > 1]
    if not quick:
        return "none is faster than the dense network"
    row, lost = max(quick, key=lambda one: one[0]["times"][batch]["ratio"])
    ratio = row["times"][batch]["ratio"]
    return f"{row['way']}, {row['fewer']}x: {ratio:.2f} times faster, {lost:.1f} lost"


def _least_lost(row: dict[str, Any], net: dict[str, Any], *, accuracy: bool) -> float:
    base = net["dense"]["before"]["mean"]
    return min(_lost(row[part]["mean"], base, accuracy=accuracy) for part in ("before", "after") if part in row)


def _lost(score: float, dense: float, *, accuracy: bool) -> float:
    return dense - score if accuracy else 100 * (score / dense - 1)


def lines(told_of: dict[str, Any]) -> dict[str, list[str]]:
    """By slug, a line for each network and number of times."""
    found: dict[str, list[str]] = {}
    for name, net in told_of["networks"].items():
        for row in net["rows"]:
            slug = next(slug for start, slug in SLUGS.items() if row["way"].startswith(start))
            scores = [told(row[part]) for part in ("before", "after") if part in row]
            kind = f" ({KINDS[row['kind']]})" if KINDS[row["kind"]] else ""
            found.setdefault(slug, []).append(
                f"{name}, {row['fewer']}x fewer {row['of']}{kind}: {net['unit']} {told(net['dense']['before'])} dense, "
                f"{' before and '.join(scores)} after a short training; time against dense in ONNX Runtime, one "
                f"thread: {speeds(row['times'])}"
            )
    return found

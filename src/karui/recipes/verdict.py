"""What a comparison means, in sentences for somebody who has never compressed a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from karui.measuring.inference import inference, tensors_of
from karui.measuring.values import bytes_text
from karui.model import Classification

if TYPE_CHECKING:
    from karui.measuring import Change, Comparison, Ratio, Score
    from karui.model import Model

HEADLINE = ("onnxruntime", "torch")
BLOCK = 8


def verdict(both: Comparison) -> list[str]:
    """Size, work, time and quality, a sentence each; what was not measured is not told."""
    told = [_size(both), _work(both), *_times(both), _quality(both)]
    return [sentence for sentence in told if sentence]


def untaught(model: Model, score: Score | None) -> tuple[str, ...]:
    """A warning where a classifier that was given as trained is no better than chance."""
    if score is None or not isinstance(model.task, Classification):
        return ()
    with inference(model.module) as module:
        outputs = tensors_of(module(*model.example))
    chance = 1 / outputs[0].shape[1] if outputs and outputs[0].ndim > 1 else 0.0
    if score.metric != "accuracy" or score.low > chance:
        return ()
    return (
        f"the dense model, {score.value:.1%}, is no better than chance: were its trained weights given (--weights)?",
    )


def odd_widths(dense: Model, light: Model, both: Comparison) -> tuple[str, ...]:
    """A remedy where fewer multiplications took no less time in ONNX Runtime, and a cut left widths it is slow at.

    It computes channels in blocks. A convolution that was cut to a width between two multiples of a block takes a
    slower path, which can cost more than the cut saves (`results/cifar_resnets.md`: 30 % of the filters, two ways).
    """
    work = both.ratio("macs")
    times = [r for r in both.ratios if r.quantity == "time" and r.engine == HEADLINE[0] and r.threads == 1]
    if work is None or work.value <= 1 or all(ratio.low > 1 for ratio in times):
        return ()
    wide = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    before = {path: layer.out_channels for path, layer in dense.module.named_modules() if isinstance(layer, wide)}
    widths = [
        layer.out_channels
        for path, layer in light.module.named_modules()
        if isinstance(layer, wide) and layer.out_channels % BLOCK and before.get(path, 1) % BLOCK == 0
    ]
    if not widths:
        return ()
    told = "1 convolution was" if len(widths) == 1 else f"{len(widths)} convolutions were"
    remedy = f"ONNX Runtime is faster at multiples of {BLOCK}, which the setting multiple={BLOCK} keeps to"
    return (f"{told} cut to widths such as {widths[0]}; {remedy}.",)


def _size(both: Comparison) -> str:
    ratio = both.ratio("bytes as saved") or both.ratio("bytes of the ONNX file")
    if ratio is None:
        return ""
    stored = ratio.quantity == "bytes as saved"
    sizes = [m.stored_bytes if stored else m.onnx_bytes for m in (both.dense, both.light)]
    before, after = (bytes_text(size or 0) for size in sizes)
    if ratio.value == 1:
        return f"The saved model is as large as before ({after})."
    return f"The saved model is {_times_text(ratio, 'smaller', 'LARGER')}: {after} instead of {before}."


def _work(both: Comparison) -> str:
    ratio = both.ratio("macs")
    if ratio is None:
        return ""
    if ratio.value == 1:
        return "It does as many multiplications for an input as before."
    fewer = ratio.value > 1
    return f"It does {_factor(ratio):.2f}x {'fewer' if fewer else 'MORE'} multiplications for an input."


def _times(both: Comparison) -> list[str]:
    """The headline engine's times on one thread."""
    for engine in HEADLINE:
        found = [r for r in both.ratios if r.quantity == "time" and r.engine == engine and r.threads == 1]
        if found:
            return [_time(ratio) for ratio in found]
    return []


def _time(ratio: Ratio) -> str:
    batch = "one input at a time" if ratio.batch == 1 else f"batches of {ratio.batch}"
    where = f"In {_name(ratio.engine)}, {batch}, one thread"
    if ratio.low <= 1 <= ratio.high:
        return f"{where}: no measurable difference in time ({ratio.low:.2f}x to {ratio.high:.2f}x)."
    low, high = ratio.interval
    word = "faster" if ratio.value > 1 else "SLOWER"
    return f"{where}: {_factor(ratio):.2f}x {word} (between {low:.2f}x and {high:.2f}x)."


def _quality(both: Comparison) -> str:
    before, after, change = both.dense.score, both.light.score, both.change
    if before is None or after is None:
        return ""
    told = f"{after.metric.capitalize()} on {after.count} test samples: {_score(after)} instead of {_score(before)}"
    return f"{told}; {_change(change)}." if change is not None else f"{told}."


def _change(change: Change) -> str:
    if change.low <= 0 <= change.high:
        return "the difference is within chance"
    better = (change.value > 0) == change.higher_is_better
    return "better, by more than chance" if better else "WORSE, by more than chance"


def _score(score: Score) -> str:
    return f"{score.value:.1%}" if score.metric == "accuracy" else f"{score.value:.4g}"


def _times_text(ratio: Ratio, gain: str, loss: str) -> str:
    return f"{_factor(ratio):.2f}x {gain if ratio.value > 1 else loss}"


def _factor(ratio: Ratio) -> float:
    return ratio.value if ratio.value >= 1 else 1 / ratio.value


def _name(engine: str) -> str:
    return {"onnxruntime": "ONNX Runtime", "torch": "PyTorch", "openvino": "OpenVINO"}.get(engine, engine)

"""Static quantisation to 8 bits: the ONNX form of a model with its activations and weights as integers.

Weights and activations become integers within known ranges, and ONNX Runtime (or OpenVINO) runs the layers between
them in integer arithmetic. The ranges of activations are seen on calibration data, which pass one batch at a time: only
the smallest and the largest value of each tensor are kept.

Does not pay on layers of few channels, where narrowing and widening cost more than the arithmetic saves; time it.

On x86 without VNNI two products of 8 bits are summed in 16 bits, which a full range of weights overflows: hence
unsigned activations and weights of 7 bits, one scale a channel. Signed activations have no fast kernel there, and the
form is then slower than the one in 32 bits.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2; `reduce_range` in the documentation of `onnxruntime.quantization`.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from karui.deployment.factors import with_balanced_factors
from karui.deployment.layers import INTEGER, Layers, integer_layers, layers_of, parsed, with_added
from karui.deployment.pools import average_pools
from karui.deployment.shortcuts import channels_of, integer_shortcuts
from karui.deployment.stored import store_weights
from karui.errors import DataError, UsageError, require
from karui.measuring import OnnxForm
from karui.measuring.hollow import Hollow
from karui.measuring.inference import tensors_of

if TYPE_CHECKING:
    import onnx
    from onnxruntime.quantization.calibrate import TensorsData

Precision = Literal["fp32", "int8", "dynamic int8"]


@dataclass(frozen=True, kw_only=True)
class Int8:
    """How a form is quantised.

    Settings:
        weight_bits: 7 or 8; with 8, sums overflow on x86 without VNNI, which costs accuracy there.
        unsigned: whether activations are unsigned; signed ones are slow on x86 without VNNI.
        per_channel: one scale for each output channel of a weight, or one for the whole tensor.
        leave: paths of layers that stay in 32 bits; a path stands for all below it.

    Raises:
        SettingError: `weight_bits` is neither 7 nor 8.

    Example:
        >>> Int8(leave=("conv1",)).weight_bits
        7
    """

    weight_bits: int = 7
    unsigned: bool = True
    per_channel: bool = True
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "leave", tuple(self.leave))
        require(self.weight_bits in (7, 8), f"weight_bits is {self.weight_bits}; give 7, or 8 for the full range")


@dataclass(frozen=True, kw_only=True)
class Int8Form:
    """A form in 8 bits.

    Settings:
        form: the ONNX form; each operator knows its layer, the added ones too.
        quantised: paths of the layers that compute in integers.
        stored: paths of the layers whose weights are stored in 8 bits, and that compute in 32 (LSTM, GRU, transposed
            convolution).
        fp32: paths of the other layers with weights, each with the reason.
        dynamic: whether activations become integers by their range at each call; else by one seen on calibration data.
    """

    form: OnnxForm
    quantised: tuple[str, ...]
    stored: tuple[str, ...]
    fp32: dict[str, str]
    dynamic: bool = False

    @property
    def precision(self) -> Precision:
        """What tables call it."""
        return "dynamic int8" if self.dynamic else "int8"

    @property
    def data(self) -> bytes:
        """The bytes of the file."""
        return self.form.data


@dataclass(frozen=True)
class Calibrated:
    """A form with the range of each of its activations.

    Settings:
        form: the form in 32 bits.
        ranges: ONNX Runtime's record of the smallest and largest value of each tensor.
        samples: number of samples that were seen.
    """

    form: OnnxForm
    ranges: TensorsData
    samples: int

    @property
    def layers(self) -> Layers:
        """The layers with weights, by what 8 bits can do for them."""
        return layers_of(self.form, parsed(self.form).proto)


def calibrate(form: OnnxForm, batches: Iterable[tuple[Any, ...]]) -> Calibrated:
    """Run calibration batches and note the range of every activation; one batch is in memory at a time.

    Of the weights the engine's copy is there alone: what prepares the graph makes copies of it, which are empty. The
    factors of decomposed weights are balanced before, so that the form that is calibrated may differ in their values.

    Args:
        form: the form in 32 bits.
        batches: each a tuple of the model's inputs.

    Raises:
        UsageError: the form is no ONNX file, or one that ONNX Runtime cannot run.
        DataError: there are no batches, or they do not fit the form, or hold values that are not finite.
    """
    from onnxruntime.quantization.calibrate import MinMaxCalibrater

    graph = parsed(form)
    form, before = with_balanced_factors(form, graph), form
    graph = graph if form is before else parsed(form)
    names = [put.name for put in graph.proto.graph.input]
    with _quiet(), tempfile.TemporaryDirectory(prefix="karui-") as scratch:
        empty, whole = Path(scratch) / "form.onnx", Path(scratch) / "ranges.onnx"
        empty.write_bytes(graph.proto.SerializeToString())
        try:
            calibrator = MinMaxCalibrater(empty, INTEGER, augmented_model_path=str(whole))
            calibrator.augment_graph()
            graph.write(calibrator.get_augment_model(), whole)
            calibrator.create_inference_session()
        except Exception as error:
            raise UsageError(f"The ONNX form cannot be calibrated: {_line(error)}", "Export it again.") from error
        samples = 0
        for batch in batches:
            arrays = _arrays(batch, names)
            try:
                calibrator.collect_data(_Once(arrays))  # pyright: ignore[reportArgumentType]  (it asks for get_next only)
            except Exception as error:
                shapes = ", ".join(str(list(array.shape)) for array in arrays.values())
                raise DataError(
                    f"The ONNX form does not run on calibration inputs {shapes}: {_line(error)}",
                    "Give batches of inputs that the model takes.",
                ) from error
            samples += len(arrays[names[0]])
        require(samples > 0, "There are no calibration batches.", "Give at least one, of some 64 samples.", DataError)
        return Calibrated(form, calibrator.compute_data(), samples)


def quantise(calibrated: Calibrated, settings: Int8 | None = None, *, only: Sequence[str] | None = None) -> Int8Form:
    """The form in 8 bits; layers that cannot be quantised stay in 32, and are named.

    Args:
        calibrated: the form and its ranges.
        settings: how; by default `Int8()`.
        only: paths of the layers that alone become integers; None takes all that can.

    Raises:
        SettingError: a layer to leave is not there.
        UsageError: ONNX Runtime cannot quantise the form.

    Relations: `layer_harms` and `leave_worst` find the layers that are better left in 32 bits.
    """
    settings = settings or Int8()
    graph = parsed(calibrated.form)
    proto = graph.proto
    layers = layers_of(calibrated.form, proto)
    left = set(layers.covered(settings.leave))
    wanted = set(layers.paths if only is None else layers.covered(only)) - left
    if inner := [name for path in layers.operators if path in wanted for name in layers.operators[path]]:
        outer = [name for path in layers.operators if path not in wanted for name in layers.operators[path]]
        proto = _with_integers(graph, calibrated.ranges, settings, inner if only is not None else [], outer)
    graph.fill(proto.graph.initializer)
    kept = [path for path in layers.stored if path in wanted]
    store_weights(proto, [name for path in kept for name in layers.stored[path]])
    quantised = integer_layers(layers, proto)
    reasons = dict.fromkeys(layers.paths, "it was left out")
    reasons |= dict.fromkeys(wanted, "ONNX Runtime could not quantise it")
    reasons |= {path: f"ONNX Runtime has no {kind} in 8 bits" for path, kind in layers.other.items()}
    return Int8Form(
        form=OnnxForm(
            data=proto.SerializeToString(deterministic=True), layers=with_added(calibrated.form.layers, proto)
        ),
        quantised=quantised,
        stored=tuple(kept),
        fp32={path: why for path, why in reasons.items() if path not in quantised and path not in kept},
    )


def to_int8(form: OnnxForm, batches: Iterable[tuple[Any, ...]], settings: Int8 | None = None) -> Int8Form:
    """Calibrate and quantise in one call.

    Raises:
        UsageError: the form is damaged, or cannot be quantised.
        DataError: the calibration batches do not fit.
        SettingError: a layer to leave is not there.

    Example:
        >>> import torch
        >>> from karui.measuring import onnx_form
        >>> from karui.model import Model
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 8))
        >>> form = onnx_form(Model(net, example=(torch.zeros(1, 64),)))
        >>> light = to_int8(form, [(torch.randn(16, 64),)])
        >>> light.quantised, light.fp32, len(light.data) < len(form.data) / 2
        (('0', '2'), {}, True)
    """
    return quantise(calibrate(form, batches), settings)


def _with_integers(
    graph: Hollow, ranges: TensorsData, settings: Int8, only: list[str], leave: list[str]
) -> onnx.ModelProto:
    """The graph with its weights as integers, and narrowed and widened values between its operators."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    channels = channels_of(graph.proto)
    average_pools(graph.proto, channels)
    made = requantised(
        graph,
        lambda: QDQQuantizer(
            graph.proto,
            per_channel=settings.per_channel,
            reduce_range=settings.weight_bits == 7,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8 if settings.unsigned else QuantType.QInt8,
            tensors_range=ranges,
            nodes_to_quantize=only,
            nodes_to_exclude=leave,
            op_types_to_quantize=INTEGER,
            extra_options={},
        ),
        "Leave layers in 32 bits: Int8(leave=...).",
    )
    integer_shortcuts(made, channels)
    without_unread(made)
    return made


def requantised(
    graph: Hollow,
    make: Callable[[], Any],
    remedy: str,
    fill: Callable[[Iterable[onnx.TensorProto]], None] | None = None,
) -> onnx.ModelProto:
    """What a quantiser of ONNX Runtime makes of a graph, without its advice, its name and its notes.

    A quantiser copies the graph several times before it starts; the weights come into the last of these copies.

    Args:
        graph: the graph, whose proto it may change.
        make: makes the quantiser, of the empty proto.
        remedy: what to do where it fails.
        fill: gives constants their values, where they are others than those of the graph.

    Raises:
        UsageError: it fails.
    """
    told = graph.proto.producer_name, graph.proto.producer_version
    with _quiet():
        try:
            quantiser = make()
            (fill or graph.fill)(quantiser.model.initializer())
            quantiser.quantize_model()
        except Exception as error:
            raise UsageError(f"The ONNX form cannot be quantised: {_line(error)}", remedy) from error
    made = quantiser.model.model
    made.producer_name, made.producer_version = told
    del made.metadata_props[:], made.graph.value_info[:]  # engines work out shapes for themselves
    return made


def without_unread(proto: onnx.ModelProto) -> None:
    """The graph without constants that nothing reads, in place: what was put in the place of others leaves some."""
    read = {name for node in proto.graph.node for name in node.input} | {put.name for put in proto.graph.output}
    if any(attribute.HasField("g") for node in proto.graph.node for attribute in node.attribute):  # inner graphs
        return
    constants = proto.graph.initializer
    for place in reversed([place for place, tensor in enumerate(constants) if tensor.name not in read]):
        del constants[place]


class _Once:
    """A reader of calibration data, as ONNX Runtime asks for it, that gives one batch."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._left = [arrays]

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The batch, then nothing."""
        return self._left.pop() if self._left else None


def _arrays(batch: Any, names: list[str]) -> dict[str, np.ndarray]:
    """A batch by the names of the form's inputs."""
    tensors = tensors_of(batch)
    require(
        len(tensors) == len(names),
        f"A calibration batch has {len(tensors)} inputs, and the model {len(names)}.",
        "Give each batch as the tuple of the model's inputs, without targets.",
        DataError,
    )
    finite = all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())
    require(finite, "A calibration batch holds values that are not finite.", "Check the data.", DataError)
    return {name: t.detach().cpu().numpy() for name, t in zip(names, tensors, strict=True)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No advice of ONNX Runtime's quantiser: it warns that the graph was not prepared by its own tool."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _line(error: BaseException) -> str:
    """What an engine complains of, without its trace."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

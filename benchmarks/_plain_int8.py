"""Quantisation as ONNX Runtime offers it in one call, with the settings that are fast without VNNI."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from karui.data.calibration import Calibration
from karui.measuring import onnx_form
from karui.model import Model
from karui.technique import Bench


class _Samples(CalibrationDataReader):
    """The same calibration samples that karui sees."""

    def __init__(self, name: str, bench: Bench) -> None:
        self._left = iter([{name: batch[0].numpy()} for batch in Calibration(bench.train, 256, 64, bench.seed)])

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The next batch, then nothing."""
        return next(self._left, None)


def plain_int8(model: Model, bench: Bench) -> bytes:
    """A network as the bytes of its ONNX file in 8 bits, by static quantisation.

    Args:
        model: the network; with one input.
        bench: where calibration samples come from.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / each for each in ("fp32.onnx", "int8.onnx")]
        files[0].write_bytes(onnx_form(model).data)
        [given] = onnx.load(files[0]).graph.input
        quantize_static(
            files[0],
            files[1],
            _Samples(given.name, bench),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return files[1].read_bytes()


def dynamic_int8(model: Model) -> bytes:
    """A network as the bytes of its ONNX file with weights in 8 bits, and activations narrowed at each call."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / each for each in ("fp32.onnx", "int8.onnx")]
        files[0].write_bytes(onnx_form(model).data)
        quantize_dynamic(files[0], files[1], per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)
        return files[1].read_bytes()

"""Static quantisation as ONNX Runtime offers it in one call, with the settings that are fast without VNNI."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from karui.data.calibration import Calibration
from karui.measuring import onnx_form
from karui.model import Model
from karui.technique import Bench


class _Pictures(CalibrationDataReader):
    """The same calibration pictures that karui sees."""

    def __init__(self, name: str, bench: Bench) -> None:
        self._left = iter([{name: batch[0].numpy()} for batch in Calibration(bench.train, 256, 64, bench.seed)])

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The next batch, then nothing."""
        return next(self._left, None)


def plain_int8(model: Model, bench: Bench, name: str = "x") -> bytes:
    """A network as the bytes of its ONNX file in 8 bits.

    Args:
        model: the network.
        bench: where calibration pictures come from.
        name: of its input.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / each for each in ("fp32.onnx", "int8.onnx")]
        files[0].write_bytes(onnx_form(model).data)
        quantize_static(
            files[0],
            files[1],
            _Pictures(name, bench),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return files[1].read_bytes()

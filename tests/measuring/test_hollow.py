"""Graphs without their large constants say what the whole ones do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from karui.measuring import OnnxForm, onnx_form
from karui.measuring.engines import onnx_session
from karui.measuring.hollow import LARGE, PAGE, Hollow
from karui.model import Model


@pytest.fixture(scope="module")
def form() -> OnnxForm:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 100), nn.LayerNorm(100), nn.Linear(100, 4))
    return onnx_form(Model(net.eval(), example=(torch.zeros(1, 64),)))


@pytest.mark.parametrize("as_bytes", [False, True])
def test_all_but_large_constants_is_there(form: OnnxForm, as_bytes: bool):
    whole, graph = onnx.load_model_from_string(form.data), Hollow(form.data if as_bytes else form)
    sizes = [len(tensor.raw_data) for tensor in graph.proto.graph.initializer]
    assert sum(len(tensor.raw_data) > LARGE for tensor in whole.graph.initializer) == 2
    assert max(sizes) <= LARGE
    assert sizes.count(0) == 2
    assert len(graph.proto.SerializeToString()) < len(form.data) / 10
    graph.fill(graph.proto.graph.initializer)
    assert graph.proto.SerializeToString(deterministic=True) == whole.SerializeToString(deterministic=True)


def test_an_engine_takes_the_constants_from_beside_it(form: OnnxForm, tmp_path: Path):
    graph, file = Hollow(form), tmp_path / "model.onnx"
    graph.write(graph.proto, file)
    assert not any(tensor.external_data for tensor in graph.proto.graph.initializer)
    places = [
        int(entry.value)
        for tensor in onnx.load(file, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    ]
    assert len(places) == 2
    assert not any(place % PAGE for place in places)
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    for prepack in (True, False):
        ours, theirs = onnx_session(file, 1, prepack=prepack), onnx_session(form, 1, prepack=prepack)
        name = theirs.get_inputs()[0].name
        assert np.array_equal(ours.run(None, {name: x})[0], theirs.run(None, {name: x})[0])


def test_a_graph_is_checked_without_its_weights(form: OnnxForm):
    Hollow(form).check(full=True)
    proto = onnx.load_model_from_string(form.data)
    proto.graph.node[0].op_type = "Nothing"
    with pytest.raises(onnx.checker.ValidationError, match="Nothing"):
        Hollow(proto.SerializeToString()).check()


def test_values_that_do_not_fit_their_dimensions_stay_where_the_check_sees_them(form: OnnxForm):
    proto = onnx.load_model_from_string(form.data)
    weight = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(weight)[:-1]
    weight.raw_data = values.tobytes()
    graph = Hollow(proto.SerializeToString())
    assert graph.values(weight.name) is None
    assert graph.proto.SerializeToString(deterministic=True).count(weight.raw_data) == 1


@pytest.mark.parametrize("damaged", [b"no model", b"\xff" * 40, b"\x3a\x7f"])
def test_what_is_no_model_is_refused(damaged: bytes):
    with pytest.raises(ValueError, match=r"too early|no end|no field"):
        Hollow(damaged)


def test_a_file_that_ends_early_is_refused(form: OnnxForm):
    with pytest.raises(ValueError, match="too early"):
        Hollow(form.data[: len(form.data) // 2])

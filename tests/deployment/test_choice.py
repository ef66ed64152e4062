"""Forms, the race between them, and the choice: by what was measured, never by what is expected."""

import dataclasses
import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from karui.deployment import Deployment, Int8, Raced, as_model, choose, deployments, race, to_int8
from karui.errors import ArtifactError, SettingError, UsageError
from karui.measuring import Clock, Timing, Timings, evaluate, onnx_form
from karui.model import Classification, Model

OPENVINO = importlib.util.find_spec("openvino") is not None


def heavy(width=256, depth=2):
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(depth)]
    return Model(nn.Sequential(*layers), example=(torch.randn(1, width),), task=Classification())


@pytest.fixture(scope="module")
def forms():
    model = heavy()
    form = onnx_form(model)
    return model, deployments(form, to_int8(form, [(torch.randn(32, 256),)], Int8(leave=("1",))), name="net")


def test_each_engine_in_each_precision(forms):
    _, made = forms
    engines = ["onnxruntime", "openvino"] if OPENVINO else ["onnxruntime"]
    assert [(d.engine, d.precision) for d in made] == [(e, p) for p in ("fp32", "int8") for e in engines]
    assert made[0].name == "net, fp32, onnxruntime"
    assert made[-1].fp32_layers == ("1",)
    assert made[0].fp32_layers == ()
    assert made[-1].bytes < 0.7 * made[0].bytes


def test_an_engine_that_is_not_installed_is_left_out(forms, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else object())
    assert {d.engine for d in deployments(onnx_form(forms[0]))} == {"onnxruntime"}


def test_without_a_layer_in_8_bits_there_is_no_such_form(forms):
    form = onnx_form(forms[0])
    nothing = to_int8(form, [(torch.randn(8, 256),)], Int8(leave=("0", "1")))
    assert {d.precision for d in deployments(form, nothing)} == {"fp32"}


@pytest.mark.parametrize(
    ("field", "words"), [("engine", "onnxruntime, openvino"), ("precision", "fp32, int8, dynamic int8")]
)
def test_wrong_values_are_told(field, words):
    good = Deployment(name="a", engine="onnxruntime", precision="fp32", data=b"")
    with pytest.raises(SettingError, match=words):
        dataclasses.replace(good, **{field: "strange"})


def test_all_are_timed_in_one_run(forms):
    model, made = forms
    raced = race(made, model.example, clock=Clock(batches=(1, 3), threads=(1,), rounds=5))
    for form in made:
        times = raced.timings.of(form.name)
        assert [(t.engine, t.batch) for t in times] == [(form.engine, 1), (form.engine, 3)]
        ratio = raced.ratio(form, 3)
        assert ratio is not None
        assert ratio.engine == form.engine
    assert raced.ratio(made[0], 1).value == 1
    assert raced.ratio(made[0], 64) is None


def test_a_form_that_cannot_run_is_told_and_not_chosen(forms):
    model, made = forms
    broken = Deployment(name="broken", engine="onnxruntime", precision="int8", data=b"no file")
    raced = race((made[0], broken), model.example, clock=Clock(batches=(1,), threads=(1,), rounds=5))
    assert raced.ratio(broken, 1) is None
    assert any("broken" in note for note in raced.timings.notes)
    assert choose(raced) is made[0]


def test_a_larger_network_loses_to_the_one_it_is_compared_with():
    small, large = heavy(64), heavy(512, depth=6)
    against = Deployment(name="small", engine="onnxruntime", precision="fp32", data=onnx_form(small).data)
    slow = Deployment(
        name="slow", engine="onnxruntime", precision="fp32",
        data=onnx_form(Model(nn.Sequential(nn.Linear(64, 512), large.module), example=small.example)).data,
    )  # fmt: skip
    raced = race((slow,), small.example, against=against, clock=Clock(batches=(16,), threads=(1,), cpu_time=True))
    assert raced.ratio(slow, 16).high < 1
    assert choose(raced, batch=16) is None


def test_two_forms_of_one_name_are_told(forms):
    model, made = forms
    with pytest.raises(UsageError, match="Two forms are called"):
        race((made[0], dataclasses.replace(made[1], name=made[0].name)), model.example)
    with pytest.raises(UsageError, match="no form"):
        race((), model.example)


def staged(*forms, spread=0.01):
    """A race with these (name, seconds, bytes); the first is what the others are compared with."""
    made = [Deployment(name=n, engine="onnxruntime", precision="fp32", data=b"." * size) for n, _, size in forms]
    times = [
        Timing(contestant=n, engine="onnxruntime", threads=1, batch=1, median=s, low=s, high=s,
               samples=tuple(s * (1 + spread * (k % 3 - 1)) for k in range(9)))
        for n, s, _ in forms
    ]  # fmt: skip
    return Raced(against=made[0], forms=tuple(made), timings=Timings(times=tuple(times)))


def test_the_fastest_that_keeps_the_floor():
    raced = staged(("dense", 1.0, 100), ("a", 0.5, 90), ("b", 0.6, 30), ("c", 1.5, 10))
    assert choose(raced).name == "a"
    asked = []
    assert choose(raced, lambda form: asked.append(form.name) or form.name != "a").name == "b"
    assert asked == ["a", "b"]
    assert choose(raced, prefer="bytes").name == "b"
    assert choose(raced, lambda _: False) is None


def test_where_nothing_is_faster_the_smallest_that_is_not_slower():
    assert choose(staged(("dense", 1.0, 100), ("same", 1.0, 30), ("slow", 1.5, 10))).name == "same"


@given(
    st.lists(st.tuples(st.floats(0.2, 3.0), st.integers(1, 50)), min_size=1, max_size=6),
    st.sampled_from(["time", "bytes"]),
)
def test_never_one_that_is_measured_slower(others, prefer):
    raced = staged(("dense", 1.0, 40), *((str(n), *other) for n, other in enumerate(others)))
    chosen = choose(raced, prefer=prefer)
    assert not raced.ratio(chosen, 1).high < 1
    if prefer == "time":
        fastest = max(raced.ratio(form, 1).value for form in raced.forms)
        assert raced.ratio(chosen, 1).low <= 1 or raced.ratio(chosen, 1).value == fastest


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        y = self.layer(x.flatten(1))
        return {"logits": y, "all": [y.sum(1), None]}


def test_a_deployment_is_judged_as_a_model(digits):
    torch.manual_seed(0)
    model = Model(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), example=(torch.zeros(1, 1, 8, 8),), task=Classification()
    )
    for form in deployments(onnx_form(model)):
        assert evaluate(as_model(form, model), digits.test) == evaluate(model, digits.test)


def test_outputs_keep_their_structure():
    model = Model(Nested(), example=(torch.zeros(1, 1, 8, 8),))
    form = Deployment(name="x", engine="onnxruntime", precision="fp32", data=onnx_form(model).data)
    x = torch.randn(5, 1, 8, 8)
    want, got = model.module(x), as_model(form, model).module(x)
    assert got["all"][1:] == [None]
    assert torch.allclose(want["logits"], got["logits"], atol=1e-5)
    assert got["all"][0].shape == (5,)
    other = dataclasses.replace(form, data=onnx_form(Model(nn.Flatten(), example=model.example)).data)
    with pytest.raises(ArtifactError, match="has 1 outputs, and the model 2"):
        as_model(other, model).module(x)

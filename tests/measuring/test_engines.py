import pytest
import torch
from torch import nn

from karui.errors import UsageError
from karui.measuring import OnnxRuntime, OpenVino, Torch, known_engine, onnx_form
from karui.measuring import engines as engines_module
from karui.measuring.engines import outputs_of
from karui.model import Model

ENGINES = [
    Torch(),
    OnnxRuntime(),
    pytest.param(OpenVino(), marks=pytest.mark.skipif(bool(OpenVino().missing()), reason=OpenVino().missing())),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    return Model(net.eval(), example=(torch.randn(1, 2, 6, 6),))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_engine_computes_the_same_at_any_batch(engine, threads, model):
    before = torch.get_num_threads()
    run = engine.prepare(model, threads)
    for size in (1, 3, 8):
        x = torch.randn(size, 2, 6, 6)
        with torch.no_grad():
            want = model.module(x)
        (got,) = outputs_of(run((x,)))
        assert torch.allclose(got, want, atol=1e-5)
    torch.set_num_threads(before)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_tells_its_name_and_version(engine):
    assert engine.version()[0].isdigit()
    assert known_engine(engine.name) == engine


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_an_onnx_file_runs_by_itself_and_a_damaged_one_is_told(engine, model):
    data = onnx_form(model).data
    x = torch.randn(2, 2, 6, 6)
    (got,) = outputs_of(engine.prepare(data, 1)((x,)))
    assert torch.allclose(got, model.module(x).detach(), atol=1e-5)
    with pytest.raises(UsageError, match="cannot open"):
        engine.prepare(data[: len(data) // 2], 1)


def test_an_operator_without_a_kernel_in_its_precision_is_named(model):
    wide = Model(model.copy().module.double(), example=(torch.randn(1, 2, 6, 6).double(),))
    with pytest.raises(UsageError, match="no kernel for the operator Conv in the precision") as refused:
        OnnxRuntime().prepare(wide, 1)
    assert "model.float()" in refused.value.hint
    assert "\n" not in str(refused.value)


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr(engines_module.importlib.util, "find_spec", lambda _: None)
    assert "not installed" in OnnxRuntime().missing()
    assert "pip install 'karui[openvino]'" in OpenVino().missing()
    assert Torch().missing() == ""


def test_an_unknown_engine_is_told():
    with pytest.raises(UsageError, match="'tensorrt' is not known. Known: onnxruntime, torch, openvino"):
        known_engine("tensorrt")

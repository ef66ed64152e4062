import sys
import types

import pytest
import torch

from karui.artifact.describe import example_from_json, example_to_json, task_from_json, task_to_json
from karui.errors import ArtifactError
from karui.model import Classification, CustomTask, Regression


def absolute(outputs, targets):
    return (outputs - targets).abs().mean()


def each(outputs, targets):
    return (outputs - targets).abs().flatten(1).mean(1)


@pytest.mark.parametrize("task", [None, Classification(label_smoothing=0.1, ignore=255), Regression()])
def test_plain_tasks_round_trip(task):
    saved, warning = task_to_json(task)
    assert (task_from_json(saved), warning) == (task, "")


def test_a_custom_task_is_saved_by_import_path(monkeypatch):
    module = types.ModuleType("a_task_of_mine")
    for function in (absolute, each):
        copy = types.FunctionType(function.__code__, function.__globals__, function.__name__)
        copy.__module__, copy.__qualname__ = module.__name__, function.__name__
        setattr(module, function.__name__, copy)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    task = CustomTask(loss=module.absolute, scores=module.each, metric="gap", higher_is_better=False)
    saved, warning = task_to_json(task)
    assert saved["loss"] == "a_task_of_mine:absolute"
    assert (task_from_json(saved), warning) == (task, "")


def test_a_task_of_local_functions_is_absent_with_a_warning():
    saved, warning = task_to_json(CustomTask(loss=lambda o, t: (o - t).mean(), scores=each))
    assert saved is None
    assert "not saved" in warning
    assert "Give it again" in warning


@pytest.mark.parametrize("path", ["os:system", "a_task_that_is_nowhere:f", "torch:__version__", "torch:a.b"])
def test_a_task_names_only_functions_that_can_be_one(path):
    with pytest.raises(ArtifactError, match=path):
        task_from_json({"kind": "custom", "loss": path, "scores": path})


def test_an_unknown_task_is_told():
    with pytest.raises(ArtifactError, match="'ranking'"):
        task_from_json({"kind": "ranking"})


@pytest.mark.parametrize(
    "example",
    [
        (torch.zeros(1, 3),),
        (torch.arange(6).reshape(2, 3), None, 3, [torch.ones(2, dtype=torch.bool)], {"mask": torch.randn(2, 2)}),
        (torch.tensor([[float("nan"), float("inf")]]), torch.zeros(0, 4)),
        (torch.randn(3, 4).half(), torch.full((200, 200), 7), "text", True),
    ],
)
def test_small_and_constant_examples_come_back_as_they_were(example):
    back = example_from_json(*example_to_json(example))
    left, right = (torch.utils._pytree.tree_flatten(value) for value in (example, back))
    assert left[1] == right[1]
    for a, b in zip(left[0], right[0], strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
        else:
            assert a == b


def test_large_examples_keep_shape_type_and_range():
    floats, tokens = torch.randn(4, 50, 50) * 3 + 5, torch.randint(7, 90, (4, 5000))
    saved, tensors = example_to_json((floats, tokens))
    back, again = (example_from_json(saved, tensors) for _ in range(2))
    assert not tensors
    assert all(torch.equal(a, b) for a, b in zip(back, again, strict=True))
    assert [(t.shape, t.dtype) for t in back] == [(floats.shape, floats.dtype), (tokens.shape, tokens.dtype)]
    assert back[0].mean().item() == pytest.approx(5, abs=0.2)
    assert back[0].std().item() == pytest.approx(3, abs=0.2)
    assert (back[1].min() >= tokens.min(), back[1].max() <= tokens.max()) == (True, True)


def test_other_inputs_are_refused():
    with pytest.raises(ArtifactError, match="example input is a set"):
        example_to_json(({1},))


WILD = {"tensor": {"shape": [1], "dtype": "os", "constant": 0}}


@pytest.mark.parametrize("values", [None, {}, {"tuple": [{"tensor": {}}]}, {"value": 3}, WILD])
def test_damaged_examples_are_told(values):
    with pytest.raises(ArtifactError):
        example_from_json(values, {})

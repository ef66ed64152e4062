"""Attention maps shown and exported, [34]."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.data import Splits
from karui.distill.attention import AttentionTransfer, normalised
from karui.distill.map_plots import attention_maps, map_figure, pictures_of, write_maps
from karui.errors import SettingError, UsageError
from karui.model import Classification, Model, taps
from karui.technique import Bench
from karui.train import SGD, Training
from karui.train.loop import REMARK

pytestmark = pytest.mark.paper(34)


def net(width: int) -> Model:
    torch.manual_seed(width)
    layers = nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)
    return Model(nn.Sequential(*layers, *head), example=(torch.zeros(1, 1, 8, 8),), task=Classification())


def test_maps_are_those_that_are_compared(digits: Splits) -> None:
    model = net(4)
    made = attention_maps(model, digits.test, samples=5)
    assert {path: tuple(maps.shape) for path, maps in made.items()} == {"1": (5, 8, 8), "3": (5, 4, 4)}
    x = torch.stack([digits.test[i][0] for i in range(5)])
    with torch.no_grad(), taps(model.module.eval(), ("3",)) as seen:
        model.module(x)
    torch.testing.assert_close(made["3"].flatten(1), normalised(seen["3"].square().sum(1)))
    largest = attention_maps(model, digits.test, ("3",), samples=5, pool="max", power=4.0)
    torch.testing.assert_close(largest["3"].flatten(1), normalised(seen["3"].abs().pow(4).amax(1)))
    with pytest.raises(UsageError, match="no layer 'nope'"):
        attention_maps(model, digits.test, ("nope",))
    with pytest.raises(SettingError, match=r"'attention_maps': layer '6' of the model gives .*\(batch, 10\)"):
        attention_maps(model, digits.test, ("6",))


def test_the_figure_has_a_row_for_each_sample_and_a_column_for_each_layer(digits: Splits) -> None:
    student, teacher = (
        attention_maps(net(width), digits.test, paths, samples=3) for width, paths in ((4, ()), (8, ("3",)))
    )
    maps = {"student": student, "teacher": teacher}
    pictures = pictures_of(digits.test, 3)
    figure = map_figure(maps, pictures)
    assert [note.text for note in figure.layout.annotations] == ["picture", "student, 1", "student, 3", "teacher, 3"]
    assert len(figure.data) == 12
    assert pictures is not None
    np.testing.assert_allclose(figure.data[1].z, pictures[1])
    np.testing.assert_allclose(figure.data[-1].z, maps["teacher"]["3"][2])
    over_time = map_figure({"student": {"0": torch.rand(2, 7)}, "other": {"0": torch.rand(2, 3, 4, 5)}})
    assert [np.shape(one.z) for one in over_time.data] == [(1, 7), (1, 7), (4, 5), (4, 5)]
    with pytest.raises(SettingError, match="no map to show"):
        map_figure({})
    assert pictures_of(TensorDataset(torch.zeros(9, 4))) is None


def test_they_are_written_as_a_page_by_itself_or_as_numbers(tmp_path: Path, digits: Splits) -> None:
    maps = {"student": attention_maps(net(4), digits.test)}
    write_maps(tmp_path / "maps.html", maps, pictures_of(digits.test))
    page = (tmp_path / "maps.html").read_text()
    assert "student, 3" in page
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page, "nothing is loaded from elsewhere"
    write_maps(tmp_path / "maps.npz", maps, pictures_of(digits.test))
    with np.load(tmp_path / "maps.npz") as held:
        assert sorted(held) == ["pictures", "student/1", "student/3"]
        np.testing.assert_array_equal(held["student/3"], maps["student"]["3"])
    with pytest.raises(SettingError, match=r"ends in '.pdf'; give one of .html, .npz"):
        write_maps(tmp_path / "maps.pdf", maps)


def test_a_training_writes_those_of_student_and_teacher_and_says_so(tmp_path: Path, digits: Splits) -> None:
    file, student, teacher = tmp_path / "maps.npz", net(4), net(8)
    bench = Bench(train=digits.train, validation=digits.validation, training=Training(epochs=1, optimizer=SGD(lr=0.01)))
    step = AttentionTransfer(teacher=teacher, layers=("3",), epochs=1, maps=str(file))
    taught = step.apply(student, bench)
    assert taught.lineage[-1].describe() == f"attention maps written to {file}"
    assert REMARK in taught.lineage[-1].settings  # pyright: ignore[reportAttributeAccessIssue]
    with np.load(file) as held:
        for name, model in (("before", student), ("after", taught), ("teacher", teacher)):
            np.testing.assert_allclose(held[f"{name}/3"], attention_maps(model, digits.validation, ("3",))["3"])
        assert not np.array_equal(held["before/3"], held["after/3"])
    plain = replace(step, maps=None).apply(student, bench)
    for name, value in plain.module.state_dict().items():
        assert torch.equal(value, taught.module.state_dict()[name])
    with pytest.raises(SettingError, match="ends in .html or .npz"):
        AttentionTransfer(maps="maps.pdf")
    with pytest.raises(SettingError, match="maps are of activations"):
        AttentionTransfer(maps="maps.html", by="gradients")

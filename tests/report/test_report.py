"""The page of a run says what the record says, works offline, and fits a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from karui.artifact import save
from karui.artifact.files import sealed
from karui.errors import ArtifactError, UsageError
from karui.measuring import Comparison, Counts, LayerCount, Measurement, Ratio, Score, Timing
from karui.model import Model
from karui.report import read_run, view, write_report
from karui.report.front import front_plot, point_rows
from karui.report.plots import accuracy_against_time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def measurement(scale: float, accuracy: float) -> Measurement:
    layers = (
        LayerCount(path="body.conv1", kind="Conv2d", parameters=int(900 * scale), nonzero=9, macs=int(9e5 * scale)),
    )
    times = tuple(
        Timing(
            contestant="x", engine="onnxruntime", threads=1, batch=batch, median=batch * 1e-3 * scale,
            low=batch * 0.9e-3 * scale, high=batch * 1.1e-3 * scale, samples=(),
        )
        for batch in (1, 64)
    )  # fmt: skip
    return Measurement(
        counts=Counts(parameters=int(1000 * scale), nonzero=9, macs=int(1e6 * scale), layers=layers),
        tensor_bytes=int(4000 * scale),
        onnx_bytes=int(8000 * scale),
        times=times,
        score=Score(value=accuracy, low=accuracy - 0.01, high=accuracy + 0.01, count=597, metric="accuracy"),
    )


def record(speed: float = 2.0) -> dict[str, Any]:
    dense, light = measurement(1.0, 0.97), measurement(1 / speed, 0.96)
    ratios = tuple(
        Ratio(
            quantity="time",
            value=speed,
            low=speed * 0.95,
            high=speed * 1.05,
            engine="onnxruntime",
            threads=1,
            batch=batch,
        )
        for batch in (1, 64)
    )
    rows = {
        which: [{"path": "body.conv1", "bytes": size, "seconds": size * 1e-6}, {"path": "<b>head</b>", "bytes": 40}]
        for which, size in (("dense", 3600), ("light", 1800))
    }
    return {
        **Comparison(dense=dense, light=light, ratios=ratios).to_json(),
        "karui": "0.1.0",
        "asked": {
            "model": "net.py:build</script>",
            "data": "digits",
            "recipe": [{"technique": "l1_filter_pruning", "settings": {"ratio": 0.5}}],
            "seed": 0,
        },
        "verdict": ["Twice as fast."],
        "steps": [
            {
                "technique": "l1_filter_pruning",
                "settings": {"ratio": 0.5},
                "seconds": 3.25,
                "parameters": 500,
                "validation": light.score.to_json() if light.score else None,
            }
        ],
        "plan": {
            "groups": [{"name": "body.conv1", "size": 16, "exact": True, "members": [{"tensor": "body.conv1.weight"}]}],
            "locked": [{"name": "head", "size": 10, "reason": "its units are the model's output"}],
        },
        "lineage": [{"kind": "note", "text": "trained for 3 epochs"}],
        "layers": rows,
        "files": {"model.onnx": 8000},
        "example": [{"shape": [1, 1, 8, 8], "dtype": "float32"}],
    }


def write(folder: Path, run: dict[str, Any]) -> str:
    (folder / "run.json").write_bytes(sealed(run, ordered=True))
    return write_report(folder).read_text(encoding="utf-8")


def without_scripts(page: str) -> str:
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_the_page_says_what_the_record_says(tmp_path: Path) -> None:
    text = without_scripts(write(tmp_path, record()))
    for told in (
        "2.00x faster",
        "1.90x to 2.10x",
        "97.0 % [96.0, 98.0]",
        "l1_filter_pruning",
        "its units are the model&#39;s output",
        "trained for 3 epochs",
        "karui.load(",
        "onnxruntime.InferenceSession",
        "(1, 1, 8, 8)",
    ):
        assert told in text, told


def test_warnings_of_the_run_are_told_and_memory_has_no_ratio(tmp_path: Path) -> None:
    run = record() | {"warnings": ["the dense model is no better than chance"]}
    for which, size in (("dense", 1_000_000), ("light", 1_001_000)):
        run[which]["memory"] = [{"engine": "onnxruntime", "batch": 1, "bytes": size}]
    text = without_scripts(write(tmp_path, run))
    assert "Warning: the dense model is no better than chance" in text
    (row,) = re.findall(r"<tr>(?:(?!</tr>).)*Peak memory.*?</tr>", text, re.DOTALL)
    assert row.count("1 MB") == 2
    assert "x larger" not in row
    assert "x smaller" not in row


def test_a_slower_model_is_called_slower(tmp_path: Path) -> None:
    text = without_scripts(write(tmp_path, record(speed=0.5)))
    (row, _) = re.findall(r"<tr>(?:(?!</tr>).)*2.00x slower.*?</tr>", text, re.DOTALL)
    assert "1.90x to 2.11x" in row
    assert "faster" not in text


def test_names_from_outside_are_escaped(tmp_path: Path) -> None:
    page = write(tmp_path, record())
    assert "build</script>" not in page
    assert "<b>head</b>" not in page


def test_no_difference_has_no_tone() -> None:
    assert view.tone(Ratio(quantity="time", value=1.1, low=0.9, high=1.3)) == ""
    assert view.tone(Ratio(quantity="time", value=1.1, low=1.05, high=1.3)) == "good"
    assert view.tone(Ratio(quantity="time", value=0.5, low=0.4, high=0.6)) == "bad"


def test_a_record_without_test_data_or_times_still_makes_a_page(tmp_path: Path) -> None:
    run = record()
    for which in ("dense", "light"):
        run[which]["score"], run[which]["times"] = None, []
    run["ratios"], run["layers"] = [], {}
    text = write(tmp_path, run)
    assert "Accuracy against time" not in text
    assert "Multiply-adds" in text


def test_what_nobody_measured_has_no_column_and_what_nobody_said_no_line(tmp_path: Path) -> None:
    run = record()
    run["asked"]["name"] = ""
    assert "parameters after" in without_scripts(write(tmp_path, run))
    run["steps"][0] |= {"seconds": None, "parameters": None}
    text = without_scripts(write(tmp_path, run))
    assert "parameters after" not in text
    assert ">seconds<" not in text
    assert ">Name<" not in text
    assert ">Seed<" in text


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no run\.json"):
        read_run(tmp_path)
    for content in (b"{", b"[]", b"{}", sealed(record(), ordered=True)[:-1], sealed(record()) + b" "):
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"run\.json is damaged"):
            write_report(tmp_path)
    for values in ({}, {"dense": {}}):
        (tmp_path / "run.json").write_bytes(sealed(values, ordered=True))
        with pytest.raises(ArtifactError, match=r"run\.json is incomplete"):
            write_report(tmp_path)


def test_a_changed_figure_of_a_record_is_noticed(tmp_path: Path) -> None:
    data = sealed(record(), ordered=True)
    for place in range(0, len(data), 97):
        (tmp_path / "run.json").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ArtifactError, match=r"run\.json is damaged"):
            read_run(tmp_path)


def test_a_damaged_file_of_the_model_is_told_and_the_page_left_alone(tmp_path: Path) -> None:
    save(Model(nn.Linear(2, 2), example=(torch.zeros(1, 2),)), tmp_path)
    write(tmp_path, record())
    (tmp_path / "report.html").write_text("before", encoding="utf-8")
    for name in ("model.onnx", "model.safetensors", "model.json"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-1])
        with pytest.raises(ArtifactError, match=f"{name} is damaged"):
            write_report(tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "before"


PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("load", () => setTimeout(() => {
  const told = {
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    hidden: Array.from(document.querySelectorAll("table.stack, .plot .main-svg, select.choice"), shown => Math.max(
      shown.getBoundingClientRect().right - shown.closest("section").getBoundingClientRect().right,
      shown.parentElement.scrollWidth - shown.parentElement.clientWidth)),
    plots: document.querySelectorAll(".plot .main-svg").length,
    fetched: performance.getEntriesByType("resource").map(entry => entry.name),
    errors: errors,
  };
  document.body.innerHTML = "<pre id=probe>" + JSON.stringify(told) + "</pre>";
}, 300));
</script></head>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian package: chromium)")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_it_draws_offline_and_fits_the_screen(tmp_path: Path, width: int) -> None:
    page = write(tmp_path, record()).replace("</head>", PROBE, 1)
    # Headless Chromium has a least window width; a frame has none, so the page is looked at through one.
    (tmp_path / "probe.html").write_text(page, encoding="utf-8")
    frame = (
        f'<iframe id=f src=probe.html style="width:{width}px;height:800px;border:0"></iframe><script>'
        "const wait = setInterval(() => { const page = document.getElementById('f').contentDocument;"
        "const told = page && page.getElementById('probe');"
        "if (told) { document.title = told.textContent; clearInterval(wait); } }, 100);</script>"
    )
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
            "--dump-dom", (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    told = json.loads(found.group(1))
    assert told["errors"] == []
    assert told["fetched"] == []
    assert told["plots"] >= 3
    assert told["overflow"] <= 0
    assert len(told["hidden"]) > told["plots"]
    assert max(told["hidden"]) <= 0, "a table or a plot of the measurements has parts that are out of sight"


def test_labels_of_the_plot_lie_towards_its_middle_and_apart() -> None:
    def labels(dense: Measurement, light: Measurement) -> list[str]:
        plot = accuracy_against_time(Comparison(dense=dense, light=light, ratios=()))
        assert plot is not None
        return [trace["textposition"] for trace in json.loads(plot.figure)["data"][:2]]

    assert labels(measurement(1.0, 0.97), measurement(0.3, 0.96)) == ["top left", "bottom right"]
    assert labels(measurement(0.3, 0.96), measurement(1.0, 0.97)) == ["bottom right", "top left"]


def budget() -> dict[str, Any]:
    def point(number: int, time: float, value: float) -> dict[str, Any]:
        score = {"value": value, "metric": "accuracy", "higher_is_better": True}
        form = {
            "told": "int8 in onnxruntime",
            "time": time,
            "bytes": time,
            "lost": 100 * (0.97 - value),
            "score": score,
        }
        return {"number": number, "forms": [form], "best": 0, "epochs": number, "folder": f"points/{number:02d}"}

    return {
        "points": [point(0, 1.0, 0.97), point(1, 0.5, 0.96), point(2, 0.6, 0.95)],
        "front": [1, 0],
        "point": 1,
        "stated": True,
        "goal": {"time": 0.5},
        "asked": {"max_drop": 2.0},
    }


def test_the_points_of_a_budget_are_a_plot():
    plot = front_plot(budget())
    assert plot is not None
    drawn = json.loads(plot.figure)
    on_front, beaten = drawn["data"]
    assert on_front["x"] == [1.0, 0.5]
    assert beaten["y"] == [95.0]
    assert "points/02, points/02/model.onnx" in beaten["hovertext"][0]
    dense = on_front["hovertext"][0]
    assert "point 0, the dense model" in dense
    assert "points/00/model.onnx" in dense
    lines = sorted(shape.get("y0", 0) for shape in drawn["layout"]["shapes"])
    assert lines[-1] == pytest.approx(95.0)  # the floor: 2 points under dense
    assert "point 1 the result" in plot.caption
    assert front_plot(None) is None


@pytest.mark.parametrize(("values", "floor"), [((0.97, 0.96, 0.95), 2.0), ((0.97, 0.98, 0.9), None), ((0.9,), None)])
def test_discs_and_the_numbers_over_them_are_inside_the_plot(values: tuple[float, ...], floor: float | None):
    told = budget()
    told["asked"]["max_drop"] = floor
    told["points"] = told["points"][: len(values)]
    for point, value in zip(told["points"], values, strict=True):
        point["forms"][0]["score"]["value"] = value
    plot = front_plot(told)
    assert plot is not None
    low, high = json.loads(plot.figure)["layout"]["yaxis"]["range"]
    # On a page, the plot is 250 pixels high; a disc of the dense network's size takes 18 on each side, a number 20.
    pixel = (high - low) / 250
    assert high - 100 * max(values) > 38 * pixel
    assert 100 * min(values) - low > 18 * pixel


def test_each_point_of_a_budget_is_a_row_with_its_folder():
    rows = point_rows(budget())
    assert [row["folder"] for row in rows] == ["points/00", "points/01", "points/02"]
    assert rows[0]["number"] == "0 (dense)"
    assert (rows[1]["time"], rows[1]["lost"]) == ("0.50", "1.00")
    assert point_rows(None) == []

"""The page of a run: one HTML file that works offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import karui
from karui.artifact.files import JSON, read, unsealed
from karui.artifact.load import read_artifact
from karui.errors import ArtifactError, KaruiError, UsageError
from karui.measuring import Comparison
from karui.measuring.values import bytes_text
from karui.report import view
from karui.report.front import front_plot, point_rows
from karui.report.plots import plots

RECORD, PAGE = "run.json", "report.html"
_AGAIN = "Run karui compress again into this folder."

_DEPLOY = """import numpy, onnxruntime

session = onnxruntime.InferenceSession("{folder}/model.onnx")
x = numpy.zeros({shape}, dtype=numpy.{dtype})      # any batch size
outputs = session.run(None, {{session.get_inputs()[0].name: x}})"""

_LOAD = """import karui

model = karui.load("{folder}")
outputs = model.module(x)"""


def write_report(folder: Path) -> Path:
    """Write `report.html` into the folder of a run, from its record `run.json`.

    Args:
        folder: where `karui compress --out` wrote.

    Returns:
        The page's path.

    Raises:
        UsageError: there is no record in the folder.
        ArtifactError: the record, or a file of the model that the page tells how to deploy, is damaged.
    """
    run = read_run(folder)
    if (folder / JSON).exists():
        read_artifact(folder)
    try:
        page = page_of(run, folder)
    except KaruiError as error:
        raise ArtifactError(f"The record {folder / RECORD} is incomplete: {error.message}", _AGAIN) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"The record {folder / RECORD} is incomplete: {error!r}.", _AGAIN) from error
    path = folder / PAGE
    draft = path.with_suffix(".html.part")
    draft.write_text(page, encoding="utf-8")
    draft.replace(path)
    return path


def read_run(folder: Path) -> dict[str, Any]:
    """The record of a run.

    Raises:
        UsageError: the folder is not there or has no record.
        ArtifactError: the record is not, byte for byte, the one that was written.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise UsageError(
            f"There is no run in {folder}: it has no {RECORD}.", "Give a folder that karui compress wrote."
        )
    return unsealed(read(path), path, ordered=True, remedy=_AGAIN)


def page_of(run: dict[str, Any], folder: Path) -> str:
    """The page's HTML."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(loader=jinja2.PackageLoader("karui.report", "."), autoescape=True)
    page = _page(run, folder)
    plotly_js = get_plotlyjs().replace("</script", "<\\/script") if page["plots"] else ""
    return environment.get_template("page.html.j2").render(page=page, plotly_js=plotly_js)


def _page(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    both = Comparison.from_json(run)
    plan = run.get("plan") or {}
    example = (run.get("example") or [{}])[0]
    return {
        "title": view.title(run),
        "subtitle": "A trained network compressed, verified, and measured against the original.",
        "cards": view.cards(both),
        "verdict": run.get("verdict") or [],
        "warnings": list(dict.fromkeys(run.get("warnings") or [])),
        "asked": view.asked(run),
        "sizes": view.sizes(both),
        "times": view.times(both),
        "machine": view.measured(both),
        "notes": view.notes(both),
        "plots": [*filter(None, [front_plot(run.get("budget"))]), *plots(both, run.get("layers") or {})],
        "points": point_rows(run.get("budget")),
        "cuts": view.cuts(plan),
        "refused": view.refused(plan),
        "remarks": plan.get("remarks") or [],
        "steps": view.steps(run),
        "lineage": [step["text"] for step in run.get("lineage") or []],
        "verification": view.verification(run.get("verification")),
        "deploy": _DEPLOY.format(
            folder=folder.name, shape=tuple(example.get("shape") or (1,)), dtype=example.get("dtype", "float32")
        ),
        "load": _LOAD.format(folder=folder.name),
        "files": [(name, bytes_text(size)) for name, size in (run.get("files") or {}).items()],
        "version": run.get("karui", karui.__version__),
    }

"""`karui list` and `karui show`, the help, and the first errors that a person meets: all without torch."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from karui.cli.app import run
from karui.survey import CHAPTERS, catalogue, coverage


def lines(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    told = capsys.readouterr()
    return told.out.splitlines(), told.err.splitlines()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "--json"], ["show", "62"], ["show", "l1_filter_pruning", "--json"], []]
)
def test_starts_without_torch(arguments: list[str]):
    code = f"import sys; from karui.cli.app import run; run({arguments}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_list_tells_every_paper_within_80_columns(capsys: pytest.CaptureFixture[str]):
    assert run(["list"]) == 0
    out, err = lines(capsys)
    assert err == []
    assert max(map(len, out)) <= 80
    numbers = [int(line.split()[0]) for line in out if line.split()[:1] and line.split()[0].isdecimal()]
    assert numbers[: len(catalogue())] == [row.survey for row in catalogue()]
    assert sum("(not yet)" in line for line in out) == len(coverage().missing)
    assert any(coverage().share in line for line in out)


def test_list_as_json_has_the_keys_of_the_specification(capsys: pytest.CaptureFixture[str]):
    assert run(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["survey"] for row in rows} == set(range(1, 81))
    for row in rows:
        assert {"survey", "slug", "title", "chapter", "kind", "needs", "technique"} <= set(row)


def test_list_of_one_chapter(capsys: pytest.CaptureFixture[str]):
    assert run(["list", "--chapter", "convolution", "--json"]) == 0
    assert {row["survey"] for row in json.loads(capsys.readouterr().out)} == {76, 77, 78}
    assert run(["list", "-c", "convolutions"]) == 2
    assert lines(capsys)[1] == ["error: Chapter 'convolutions' is not known.", "hint: Did you mean convolution?"]


def test_show_a_paper_without_a_technique(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("karui.survey.papers.techniques", tuple)
    assert run(["show", "25"]) == 0
    out, _ = lines(capsys)
    assert out[0].startswith("25. svd_softmax")
    assert max(map(len, out)) <= 80
    assert any("no technique for this paper yet" in line for line in out)


def test_show_every_row(capsys: pytest.CaptureFixture[str]):
    for row in catalogue():
        assert run(["show", row.slug]) == 0
        out, err = lines(capsys)
        assert max(map(len, out)) <= 80, row.slug
        assert err == []
        assert run(["show", row.slug, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["slug"] == row.slug
        assert bool(row.technique) == ("settings" in told)


def test_show_tells_what_was_measured(capsys: pytest.CaptureFixture[str]):
    assert run(["show", "svd_softmax"]) == 0
    text = " ".join(lines(capsys)[0])
    assert "not pay" in text
    assert "results/svd_softmax.md" in text
    assert run(["show", "svd_softmax", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["measured"]
    assert "results/svd_softmax.md" in {line["source"] for line in told}
    assert any("top-1 agreement 100.00 [100.00, 100.00] %" in line["text"] for line in told)


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        ([], "No command was given.", "karui list"),
        (["lst"], "No such command 'lst'.", "--help"),
        (["show"], "Missing argument 'SLUG|NUMBER'.", "karui show --help"),
        (["show", "l1_filter_prunning"], "is not known", "Did you mean l1_filter_pruning"),
        (["show", "99"], "There is no paper 99.", "1 to 80"),
        (["list", "--jsn"], "No such option", "karui list --help"),
    ],
)
def test_wrong_usage_is_one_line_and_a_remedy(
    arguments: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]
):
    assert run(arguments) == 2
    _, err = lines(capsys)
    assert len(err) == 2
    assert err[0].startswith("error: ")
    assert error in err[0]
    assert err[1].startswith("hint: ")
    assert hint in err[1]


def test_a_traceback_only_with_debug(capsys: pytest.CaptureFixture[str]):
    run(["show", "nothing_like_it_at_all"])
    assert "Traceback" not in capsys.readouterr().err
    run(["--debug", "show", "nothing_like_it_at_all"])
    assert "Traceback" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]):
    from karui import __version__

    for option in ("--version", "-V"):
        assert run([option]) == 0
        assert capsys.readouterr().out == f"karui {__version__}\n"


def test_as_a_module_with_exit_code_and_a_closed_pipe():
    failed = subprocess.run([sys.executable, "-m", "karui", "show", "99"], check=False, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    shell = f"{sys.executable} -m karui list --json | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[\n", "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_completion_can_be_installed(tmp_path: Path):
    # The shell is found among the parents of the command, so it is run from one; what runs the tests may be any.
    code = f"{shlex.quote(sys.executable)} -m karui --install-completion; exit $?"
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(["bash", "-c", code], check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*karui*"))


def test_chapters_are_all_told_in_the_help(capsys: pytest.CaptureFixture[str]):
    assert run(["list", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(chapter in told for chapter in CHAPTERS)

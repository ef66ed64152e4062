"""The machine of a measurement tells what decides its speed."""

from pathlib import Path

import pytest
import torch

from karui.measuring import this_machine
from karui.measuring.values import from_json, to_json
from karui.recipes.budget.cache import TimingCache


def of_capabilities(monkeypatch: pytest.MonkeyPatch, **known: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)


def test_processors_of_one_name_differ_in_their_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    of_capabilities(monkeypatch, avx2=True, avx512_f=True, avx512_vnni=True, sse=True)
    machine = this_machine()
    assert machine.instructions == ("AVX2", "AVX-512", "AVX-512 VNNI")
    assert f"{machine.processor} (AVX2, AVX-512, AVX-512 VNNI), " in str(machine)
    assert from_json(type(machine), to_json(machine)) == machine


def test_an_older_torch_tells_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    machine = this_machine()
    assert machine.instructions == ()
    assert str(machine).startswith(f"{machine.processor}, ")


def test_times_of_other_instructions_are_kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = []
    for vnni in (True, False, True):
        of_capabilities(monkeypatch, avx2=True, avx512_vnni=vnni)
        files.append(TimingCache.of_this_machine(tmp_path).file)
    assert files[0] == files[2]
    assert files[0] != files[1]

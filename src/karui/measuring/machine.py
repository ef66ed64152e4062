"""What a measurement was taken on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512_f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "amx_int8": "AMX",
    "dot": "dot product",
    "i8mm": "I8MM",
    "sve": "SVE",
}
"""What torch calls them, and their names."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine and the software of a measurement.

    Settings:
        processor: the processor's model.
        instructions: what it multiplies matrices with, as far as torch tells. Processors of one model name differ in
            it, and numbers of 8 bits are several times as fast where there is an instruction for them.
        threads: hardware threads that this process may use.
        memory: bytes of main memory; 0 where it is not known.
        system: operating system and architecture.
        versions: of Python, torch and the engines.
    """

    processor: str
    instructions: tuple[str, ...] = ()
    threads: int
    memory: int
    system: str
    versions: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        told = f" ({', '.join(self.instructions)})" if self.instructions else ""
        return f"{self.processor}{told}, {self.threads} threads, {self.system}; {versions}"


def threads_here() -> int:
    """Hardware threads that this process may use."""
    if "sched_getaffinity" in dir(os):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def this_machine(packages: Iterable[str] = ("onnxruntime", "openvino", "onnx", "onnxscript", "numpy")) -> Machine:
    """The machine that this process runs on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        processor=_processor(),
        instructions=_instructions(),
        threads=threads_here(),
        memory=_memory(),
        system=f"{platform.system()} {platform.machine()}",
        versions=versions,
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown processor"


def _instructions() -> tuple[str, ...]:
    known = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not tell
    return tuple(word for name, word in INSTRUCTIONS.items() if known.get(name))


def _memory() -> int:
    if "sysconf" in dir(os) and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0

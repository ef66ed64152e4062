"""Activation records: what the owner of a teacher publishes of its training data, in place of the data (survey 41).

For each class, mean and covariance of what layers of the teacher give. A record is a small safetensors file; its header
says exactly what was recorded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from karui.artifact.files import read as read_bytes
from karui.artifact.files import write_file
from karui.errors import ArtifactError, require
from karui.measuring.values import bytes_text
from karui.numerics.spectral import root, sketch

Kind = Literal["top", "all", "all_dropout", "spectral_all", "spectral_pairs", "jl"]
KINDS = get_args(Kind)
FORMAT, HEADER = 1, "activation_record"
DEFINITIONS = {
    "top": "the last layer's output over the temperature; matched behind a ReLU",
    "all": "each layer's output, the last one's over the temperature; matched behind a ReLU, each over its size",
    "all_dropout": "as 'all'; rebuilt under one random mask of inputs and hidden units for each batch",
    "spectral_all": "outputs of all layers behind a ReLU, each over its size, on the smoothest eigenvectors of D - A, "
    "A = exp(-d² / (2 median d²)), d² the mean square difference of two units' activations over the training data",
    "spectral_pairs": "as 'spectral_all', on the bipartite graph of each two consecutive layers",
    "jl": "outputs of all layers behind a ReLU, each over its size, on normal vectors drawn from the seed",
}


@dataclass(frozen=True, eq=False)
class Block:
    """One part of a record: some layers' outputs, perhaps projected.

    Settings:
        layers: paths, the outputs of which are put side by side.
        sizes: units of each.
        means: for each class.
        spreads: covariances for each class; variances alone where they have one dimension less.
        basis: columns that rectified outputs, each over its layer's size, are projected on; None records them as
            they are.
    """

    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    means: Float[Tensor, "classes features"]
    spreads: Tensor
    basis: Float[Tensor, "units features"] | None = None

    def projection(self) -> Float[Tensor, "units features"] | None:
        """The basis, with each layer's units over its size: so that all layers weigh as in kind "all"."""
        if self.basis is None:
            return None
        return self.basis / torch.cat([torch.full((size, 1), float(size)) for size in self.sizes]).to(self.basis)

    def sample(self, classes: Tensor, generator: torch.Generator) -> Float[Tensor, "samples features"]:
        """Targets drawn from the normal distribution of each sample's class.

        The noise is multiplied by a root of the covariance, not by the covariance itself.
        """
        noise = torch.randn(len(classes), self.means.shape[1], dtype=self.means.dtype, generator=generator)
        if self.spreads.ndim == 2:
            return self.means[classes] + noise * self.spreads[classes].clamp(min=0).sqrt()
        drawn = self.means[classes].clone()
        for number in classes.unique().tolist():
            rows = classes == number
            drawn[rows] += noise[rows] @ root(self.spreads[number].double()).to(noise).T
        return drawn


@dataclass(frozen=True, eq=False)
class Record:
    """Activation records of a teacher on its training data, without any of the data.

    Settings:
        kind: what was recorded; see `DEFINITIONS`.
        temperature: the last layer's outputs are divided by it.
        blocks: the statistics.
        counts: samples of each class.
        shape: of one input.
        pixels: mean, deviation, smallest and largest number of all inputs together: four numbers in all.
        seed: of the random projection of "jl".
    """

    kind: Kind
    temperature: float
    blocks: tuple[Block, ...]
    counts: tuple[int, ...]
    shape: tuple[int, ...]
    pixels: tuple[float, float, float, float]
    seed: int = 0

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of all layers, once each, the first one first."""
        return tuple(dict.fromkeys(path for block in self.blocks for path in block.layers))

    @property
    def numbers(self) -> int:
        """How many numbers of four bytes its file holds: K (d + d²) a block, and the basis that it stores."""
        kept = sum(block.means.numel() + block.spreads.numel() for block in self.blocks)
        drawn = self.kind == "jl"
        return kept + sum(0 if block.basis is None or drawn else block.basis.numel() for block in self.blocks)

    @property
    def input_bytes(self) -> int:
        """What the inputs would take that it stands for, four bytes a number."""
        return sum(self.counts) * math.prod(self.shape) * 4

    def describe(self) -> str:
        """What it is, its size beside that of the data, and what it tells of them, in a line."""
        samples, told = sum(self.counts), f"{len(self.counts)} classes of {min(self.counts):,} samples or more"
        return (
            f"activation record '{self.kind}' of {len(self.layers)} layers, {bytes_text(self.numbers * 4)} beside "
            f"{bytes_text(self.input_bytes)} of {samples:,} inputs: means and covariances of {told}; no sample is in "
            "it, but means of few samples tell of each, so it protects no privacy by itself"
        )

    def save(self, path: Path) -> int:
        """Write it to one safetensors file; the number of bytes."""
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for number, block in enumerate(self.blocks):
            tensors |= {f"{number}.means": block.means, f"{number}.spreads": block.spreads}
            if block.basis is not None and self.kind != "jl":
                tensors[f"{number}.basis"] = block.basis
        plain = {name: value.detach().float().contiguous().clone() for name, value in tensors.items()}
        data = save(plain, {HEADER: json.dumps(self._header(), sort_keys=True)})
        write_file(path, data)
        return len(data)

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "definition": DEFINITIONS[self.kind],
            "temperature": self.temperature,
            "blocks": [{"layers": block.layers, "sizes": block.sizes} for block in self.blocks],
            "counts": self.counts,
            "shape": self.shape,
            "pixels": self.pixels,
            "seed": self.seed,
        }


def load_record(path: Path) -> Record:
    """A record from its file.

    Raises:
        ArtifactError: it is not there, damaged, or no record.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    data = read_bytes(path)
    try:
        tensors = load(data)
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
        require(
            header["format"] == FORMAT and header["kind"] in KINDS,
            f"{path} is of another version.",
            error=ArtifactError,
        )
        blocks = tuple(_block(header, number, part, tensors) for number, part in enumerate(header["blocks"]))
        counts, shape, pixels = (tuple(header[name]) for name in ("counts", "shape", "pixels"))
        return Record(header["kind"], header["temperature"], blocks, counts, shape, pixels, header["seed"])  # pyright: ignore[reportArgumentType]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path} is no activation record, or damaged.",
            "Let its owner write it again: data_free_distillation, record.",
        ) from error


def _block(header: dict[str, Any], number: int, part: dict[str, Any], tensors: dict[str, Tensor]) -> Block:
    means, spreads = tensors[f"{number}.means"], tensors[f"{number}.spreads"]
    basis = tensors.get(f"{number}.basis")
    if header["kind"] == "jl":
        basis = sketch(sum(part["sizes"]), means.shape[1], header["seed"]).float()
    return Block(tuple(part["layers"]), tuple(part["sizes"]), means, spreads, basis)


def joined(outputs: dict[str, Tensor], layers: Sequence[str]) -> Float[Tensor, "batch units"]:
    """Outputs of layers side by side."""
    return torch.cat([outputs[path] for path in layers], 1)

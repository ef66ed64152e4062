"""Checkpoints: one safetensors file with the tensors of a training and, in its header, where the training stands.

One file, renamed into place, so that a crash leaves the old state or the new one and never half of each. Its name holds
a fingerprint of everything that decides the outcome: a repeated call finds its own state, and no other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from karui.errors import TrainingError
from karui.model import apart

HEADER = "karui.training"


def write(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Put tensors and facts in a file, at once or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(apart(tensors), unfinished, metadata={HEADER: json.dumps(facts)})
        with unfinished.open("rb+") as handle:
            os.fsync(handle.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts that `write` put there.

    Raises:
        TrainingError: the file is no checkpoint, or damaged.
    """
    try:
        # In one go: opened by its name twice, the file might have been replaced in between by a running training.
        content = file.read_bytes()
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        return tensors, json.loads(json.loads(content[8 : 8 + length])["__metadata__"][HEADER])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"The checkpoint {file} cannot be read: {str(error).splitlines()[0]}.",
            "Remove it to train from the beginning.",
        ) from error


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, also those that a state dict leaves out, each once."""
    return {
        **{f"parameter:{name}": value for name, value in module.named_parameters()},
        **{f"buffer:{name}": value for name, value in module.named_buffers()},
    }


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state of the optimizers, by turn, number of the parameter, and name."""
    return {
        f"optimizer:{turn}:{number}:{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for turn, optimizer in enumerate(optimizers)
        for number, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def restore(tensors: Mapping[str, Tensor], module: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
    """Put saved tensors back into a module and its optimizers, in place.

    A tensor without rows may have gathered some before the checkpoint, as a record of the epochs does; it grows again.

    Raises:
        TrainingError: the tensors belong to another network.
    """
    own = module_tensors(module)
    saved = {name: value for name, value in tensors.items() if not name.startswith("optimizer:")}
    for name, value in own.items():
        if name in saved and value.ndim and not len(value) and value.shape[1:] == saved[name].shape[1:]:
            value.data = value.new_empty(saved[name].shape)
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in saved.items()}:
        raise TrainingError(
            "The checkpoint holds the tensors of another network.", "Remove it, or give another folder for checkpoints."
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(saved[name])
    for turn, optimizer in enumerate(optimizers):
        for number, parameter in enumerate(_parameters(optimizer)):
            prefix = f"optimizer:{turn}:{number}:"
            for name, value in tensors.items():
                if name.startswith(prefix):
                    # step counts stay on the CPU, where torch keeps them
                    where = parameter.device if value.shape == parameter.shape and value.ndim else value.device
                    optimizer.state[parameter][name.removeprefix(prefix)] = value.to(where)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]

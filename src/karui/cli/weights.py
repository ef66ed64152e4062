"""`--weights FILE`: a plain state dict in safetensors, npz or torch's format, read without running any code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from karui.errors import UsageError, require

if TYPE_CHECKING:
    from torch import Tensor, nn

_NESTED = ("state_dict", "model", "model_state_dict", "net")
_FORMS = "Give a .safetensors file, an .npz of arrays, or what torch.save(model.state_dict(), FILE) wrote."


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises:
        UsageError: there is no such file, or it holds something else than named tensors.
    """
    require(not path.is_dir(), f"{path} is a folder, no weights file.", _FORMS, UsageError)
    require(path.is_file(), f"There is no weights file {path}.", _FORMS, UsageError)
    reader = {".safetensors": _safetensors, ".npz": _npz}.get(path.suffix, _torch)
    try:
        held = reader(path)
    except Exception as error:  # a damaged file may make its reader raise anything
        raise UsageError(f"{path} cannot be read as weights: {_told(error)}", _FORMS) from error
    return _plain(held, path)


def _safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _npz(path: Path) -> Any:
    import numpy as np
    import torch

    with np.load(path, allow_pickle=False) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    words = [name for name, array in held.items() if array.dtype.kind not in "biufc"]
    if words:
        raise ValueError(f"its array '{words[0]}' holds no numbers")
    return {name: torch.from_numpy(array) for name, array in held.items()}


def _torch(path: Path) -> Any:
    import torch

    with path.open("rb") as file:
        begins = file.read(1)
    try:
        if begins not in {b"P", b"\x80"}:  # an archive, or a pickle as older versions wrote
            raise EOFError("neither an archive nor a pickle")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to load the file anyway, which would run whatever code it holds.
        raise ValueError(
            "it holds more than named tensors (a whole model, perhaps), and code is never run from it"
        ) from error
    except Exception as error:  # a file of another kind may make the reader raise anything
        raise ValueError("it is damaged, or no file that torch.save wrote") from error


def _named_tensors(held: Any) -> bool:
    from torch import Tensor

    return isinstance(held, Mapping) and bool(held) and all(isinstance(value, Tensor) for value in held.values())


def _plain(held: Any, path: Path) -> dict[str, Tensor]:
    """The state dict itself: out of a checkpoint's usual wrapping, and without the prefix of a parallel wrapper."""
    from torch import Tensor

    while isinstance(held, Mapping) and not _named_tensors(held):
        inner = next((held[name] for name in _NESTED if isinstance(held.get(name), Mapping)), None)
        if inner is None:
            states = [value for value in held.values() if _named_tensors(value)]
            names = ", ".join(str(name) for name in held) or "nothing"
            told = (
                f"{path} holds no set of named tensors" if not states else f"{path} holds {len(states)} sets of weights"
            )
            require(len(states) == 1, f"{told}: {names[:80]}.", _FORMS, UsageError)
            inner = states[0]
        held = inner
    fits = isinstance(held, Mapping) and all(isinstance(value, Tensor) for value in held.values())
    require(fits, f"{path} holds a {type(held).__name__}, no named tensors only.", _FORMS, UsageError)
    wrapped = all(name.startswith("module.") for name in held)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in held.items()}


def put_weights(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load the tensors into the module, all of them or none.

    Args:
        module: the network; changed in place.
        weights: tensors by name.
        where: what an error calls the file.

    Raises:
        UsageError: they do not fit; the message names the first that does not and counts the others.
    """
    own = module.state_dict()
    # Counters of batches came to batch normalisation later than many published weights; they do not act in a forward.
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in own]
    unlike = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    whole = [name for name in own if name in weights and own[name].is_floating_point() and not _is_real(weights[name])]
    if unlike:
        first = f"{unlike[0]} is {_shape(weights[unlike[0]])} there and {_shape(own[unlike[0]])} in the model"
    elif missing:
        first = f"{missing[0]} is not in the file"
    elif unexpected:
        first = f"the model has no {unexpected[0]}"
    elif whole:
        first = f"{whole[0]} holds {_kind(weights[whole[0]])} there and {_kind(own[whole[0]])} in the model"
    else:
        _check_finite(own, weights, where)
        module.load_state_dict({**own, **weights})
        return
    counts = f"{len(unlike)} of another shape, {len(missing)} missing, {len(unexpected)} unexpected, of {len(own)}"
    raise UsageError(
        f"{where} does not fit the model: {first} ({counts}).",
        "Give the weights of this very network, or the network (and number of classes) that they belong to.",
    )


def _check_finite(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors with values that are no numbers; infinities may be meant, as in the mask of an attention."""
    spoilt = [name for name in own if name in weights and _is_real(weights[name]) and weights[name].isnan().any()]
    hint = "The training that wrote them went wrong, or the file is damaged; give weights of an earlier epoch."
    others = f" and {len(spoilt) - 1} more of its tensors" if len(spoilt) > 1 else ""
    told = f"{where}: {spoilt[0] if spoilt else ''}{others} {'hold' if others else 'holds'} values that are no numbers"
    require(not spoilt, f"{told} (NaN).", hint, UsageError)


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _told(error: Exception) -> str:
    """The first sentence of an error; its kind before it, unless it is one that only carries a message."""
    sentence = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
    plain = type(error) in (ValueError, RuntimeError, OSError) and bool(sentence)
    return f"{sentence}." if plain else f"{type(error).__name__}{': ' if sentence else ''}{sentence}."

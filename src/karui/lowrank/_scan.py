"""Which layers of a network can be replaced, and how the example input meets them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from karui.errors import SettingError
from karui.lowrank._choice import Choice
from karui.model import Model
from karui.model.taps import layer_at

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FLATTENING = ("flatten", "view", "reshape")


@dataclass(frozen=True)
class Seen:
    """A layer that may be replaced, as the example input met it.

    Settings:
        path: its name in the network.
        layer: the layer, exactly a `Linear` or a convolution.
        order: its place among the layers called, from 0.
        first: whether it is the first convolution that was called.
        final: whether the network's output has this layer's outputs as its last (or its class) dimension: of layers of
            that width, the last one that was called; of several outputs of that width, as many.
        map: shape of the feature map, channels first, whose flattening was its input; empty where it was none.
        calls: how often it was called.
        space, made: sizes of its inputs and outputs for one sample, call by call: of maps those in space, of sequences
            their length, of single vectors none. A call on several maps or vectors of one sample, as where frames lie
            side by side in the batch, has as many.
    """

    path: str
    layer: Any
    order: int
    first: bool = False
    final: bool = False
    map: tuple[int, ...] = ()
    calls: int = 0
    space: tuple[tuple[int, ...], ...] = ()
    made: tuple[tuple[int, ...], ...] = ()

    @property
    def inputs(self) -> int:
        """Positions of its inputs for one sample, of all calls together."""
        return sum(map(math.prod, self.space))

    @property
    def outputs(self) -> int:
        """Positions of its outputs for one sample, of all calls together; each multiplies by the whole weight."""
        return sum(map(math.prod, self.made))

    def between(self, dims: int) -> int:
        """Positions for one sample, of all calls together, where only the first `dims` dimensions are filtered yet."""
        return sum(math.prod((*made[:dims], *space[dims:])) for space, made in zip(self.space, self.made, strict=True))


def scan(
    model: Model, fits: Callable[[Any], str], skip: Sequence[str] = (), *, shared: bool = False
) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
    """The layers that can be replaced, in the order of their calls, and those that cannot, with the reason.

    Args:
        model: the model, run once on its example.
        fits: the technique's own objection to a layer, "" for none.
        skip: paths of layers to leave.
        shared: whether a layer whose weight is shared may be replaced: it is then no longer.

    Raises:
        SettingError: `skip` names no layer.
    """
    for path in skip:
        layer_at(model.module, path, SettingError)
    modules = list(model.module.named_modules())
    owners = {} if shared else _owners(model.module)
    left, candidates = [], []
    for path, layer in modules:
        if not is_layer(layer):
            continue
        reason = "named in skip" if path in skip else _objection(model.module, path, layer, owners) or fits(layer)
        if reason:
            left.append(Choice(path, reason=reason))
        else:
            candidates.append((path, layer))
    seen = tuple(one for one in _watch(model) if one.path in dict(candidates))
    unseen = [path for path, _ in candidates if path not in {one.path for one in seen}]
    reason = "the network does not call it on the example input (its weight may be used directly)"
    return seen, (*left, *(Choice(path, reason=reason) for path in unseen))


def is_layer(layer: nn.Module) -> bool:
    """Whether a module holds a matrix as a layer does, and not beside layers of its own (a class token, a scale)."""
    if _parametrized(layer):
        return True
    own = type(layer).__module__.startswith("torch.nn") or not list(layer.children())
    return own and any(p.ndim > 1 for p in layer.parameters(recurse=False))


def _parametrized(layer: nn.Module) -> bool:
    return "parametrizations" in dict(layer.named_children())


def _objection(module: nn.Module, path: str, layer: nn.Module, owners: Mapping[int, list[str]]) -> str:
    """Why no technique may replace this layer, "" if one may."""
    if _parametrized(layer):
        return "its weight is parametrised; remove the parametrisation first (torch.nn.utils.parametrize)"
    if type(layer) not in (nn.Linear, *_CONVOLUTIONS):
        return f"{type(layer).__name__} is neither a linear layer nor a convolution"
    parent = module.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight directly in its fast path"
    return _objection_to_weight(path, layer, owners)


def _objection_to_weight(path: str, layer: nn.Module, owners: Mapping[int, list[str]]) -> str:
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return "its weight is computed by a hook (weight or spectral normalisation); remove that first"
    weight: Any = layer.weight
    if not weight.is_floating_point() or isinstance(weight, nn.parameter.UninitializedParameter):
        return f"its weight is no real matrix ({weight.dtype})"
    others = [name for name in owners.get(id(weight), []) if name != f"{path}.weight".lstrip(".")]
    if others:
        return f"its weight is shared with {', '.join(others)}"
    return ""


def _owners(module: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


@dataclass
class _Flattened(TorchFunctionMode):
    """Remembers the shapes of feature maps that were flattened, by the place of their values in memory."""

    maps: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _FLATTENING and isinstance(result, Tensor) and result.ndim == 2:
            source = args[0]
            if source.ndim > 2 and result.shape == (source.shape[0], math.prod(source.shape[1:])):
                self.maps[result.data_ptr(), result.shape[1]] = tuple(source.shape[1:])
                self.alive.append(result)
        return result


def _watch(model: Model) -> tuple[Seen, ...]:
    """Run the example once and note, for each linear layer and convolution, where and how it is called."""
    seen: dict[str, Seen] = {}
    called: list[str] = []
    flattened = _Flattened()
    samples = next((len(one) for one in tree_leaves(model.example) if isinstance(one, Tensor) and one.ndim), 1)

    def note(path: str) -> Any:
        def hook(layer: Any, inputs: Any, output: Tensor) -> None:
            called.append(path)
            given = inputs[0]
            taken = flattened.maps.get((given.data_ptr(), given.shape[-1]), ()) if given.ndim == 2 else ()
            one = seen.get(path) or Seen(path, layer, len(seen), map=taken)
            seen[path] = replace(
                one,
                map=taken if taken == one.map else (),
                calls=one.calls + 1,
                space=one.space + _sizes(layer, given, samples),
                made=one.made + _sizes(layer, output, samples),
            )

        return hook

    kinds = (nn.Linear, *_CONVOLUTIONS)
    watched = [(path, layer) for path, layer in model.module.named_modules() if type(layer) in kinds]
    handles = [layer.register_forward_hook(note(path)) for path, layer in watched]
    modes = [(layer, layer.training) for layer in model.module.modules()]
    model.module.eval()
    try:
        with torch.no_grad(), flattened:
            results = tree_leaves(model.module(*model.example))
    finally:
        for handle in handles:
            handle.remove()
        for layer, mode in modes:
            layer.training = mode
    final = _final([result for result in results if isinstance(result, Tensor)], called, seen)
    first = next((one for one in seen.values() if not isinstance(one.layer, nn.Linear)), None)
    return tuple(replace(one, first=one is first, final=path in final) for path, one in seen.items())


def _final(results: Sequence[Tensor], called: Sequence[str], seen: Mapping[str, Seen]) -> set[str]:
    """The layers that give the network's outputs, from the last one called."""
    wanted, found = Counter(size for one in results for size in {*one.shape[1:2], *one.shape[-1:]}), set()
    for path in dict.fromkeys(reversed(called)):
        width = seen[path].layer.weight.shape[0]
        if wanted[width]:
            wanted[width] -= 1
            found.add(path)
    return found


def _sizes(layer: Any, value: Tensor, samples: int) -> tuple[tuple[int, ...], ...]:
    """The sizes of one sample's part of what a layer is given, or gives, in one call.

    Parts of a sample may lie beside one another in the batch (frames, windows), and a sequence may lie before it.
    """
    if isinstance(layer, nn.Linear):
        positions = max(1, math.prod(value.shape[:-1]) // samples)
        return ((positions,),) if value.ndim > 2 else ((),) * positions
    dims = len(layer.kernel_size)
    return (tuple(value.shape[-dims:]),) * max(1, math.prod(value.shape[: -dims - 1]) // samples)


def groups_of(one: Seen) -> int:
    """How many blocks the layer's weight has."""
    return 1 if isinstance(one.layer, nn.Linear) else one.layer.groups


def filters_of(one: Seen) -> int:
    """How many filters each of its groups has."""
    return one.layer.weight.shape[0] // groups_of(one)

"""What the techniques of this room share: which layers can be replaced, what each replacement costs, and the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from karui.errors import NeedError, SettingError, require
from karui.layers.factored import factor_conv, factor_linear
from karui.model import Model, Note, replace_layers
from karui.model.taps import layer_at
from karui.numerics.svd import truncated_svd
from karui.numerics.unfold import split_groups
from karui.technique import require_passes

if TYPE_CHECKING:
    from karui.technique import Bench
    from karui.train import Influence

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FLATTENING = ("flatten", "view", "reshape")


@dataclass(frozen=True)
class Seen:
    """A layer that may be replaced, as the example input met it.

    Settings:
        path: its name in the network.
        layer: the layer, exactly a `Linear` or a convolution.
        order: its place among the layers called, from 0.
        calls: how often it was called.
        inputs, outputs: positions at which it is applied (of the last call, for one sample), at its input and output.
        first: whether it is the first convolution that was called.
        final: whether the network's output has this layer's outputs as its last (or its class) dimension.
        map: shape of the feature map, channels first, whose flattening was its input; empty where it was none.
        space, made: sizes in space of a convolution's input and output (of the last call); empty for a linear layer.
    """

    path: str
    layer: Any
    order: int
    calls: int
    inputs: int
    outputs: int
    first: bool
    final: bool
    map: tuple[int, ...]
    space: tuple[int, ...] = ()
    made: tuple[int, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What is done with one layer: its ranks (empty: left as it is, for the reason), parameters and multiply-adds.

    `error` is the relative Frobenius error of the weight, known once the layer is built. `remark` is worth telling.
    `form` says what takes the layer's place where ranks do not.
    """

    path: str
    ranks: tuple[int, ...] = ()
    full: tuple[int, ...] = ()
    reason: str = ""
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    remark: str = ""
    error: float | None = None
    form: str = ""

    @property
    def replaced(self) -> bool:
        """Whether the layer is factored."""
        return not self.reason

    def describe(self) -> str:
        """One line for a person."""
        if not self.replaced:
            return f"{self.path}: left as it is: {self.reason}"
        sizes = f"{self.parameters[0]:,} -> {self.parameters[1]:,} parameters"
        return f"{self.path}: {self._made()}, {sizes}{'; ' if self.remark else ''}{self.remark}"

    def _made(self) -> str:
        ranks, full = (" x ".join(map(str, numbers)) for numbers in (self.ranks, self.full))
        return self.form or f"rank {ranks} of {full}"

    def to_json(self) -> dict[str, Any]:
        """Its values, for the lineage."""
        if not self.replaced:
            return {"layer": self.path, "reason": self.reason}
        return {
            "layer": self.path,
            "ranks": list(self.ranks),
            "full": list(self.full),
            "parameters": list(self.parameters),
            "macs": list(self.macs),
            "error": self.error,
            **({"remark": self.remark} if self.remark else {}),
            **({"form": self.form} if self.form else {}),
        }


class PerLayer:
    """What techniques that take one layer after the other tell before anything is done.

    They give `_scan`, the layers that can be replaced and the choices for those that cannot, and `_choose`, what is to
    become of one.
    """

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What would be done with each layer, and why."""
        return tuple(choice.describe() for choice in self.choose(model))

    def choose(self, model: Model) -> tuple[Choice, ...]:
        """What is to become of each layer, or the reason why it is left."""
        seen, left = self._scan(model)
        return (*map(self._choose, seen), *left)

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        raise NotImplementedError

    def _choose(self, one: Seen) -> Choice:
        raise NotImplementedError


def unless_larger(choice: Choice, *, macs: bool = True) -> Choice:
    """The choice, or the layer left as it is where its factors would hold or (`macs`) compute as much as it does."""
    for what, (before, after) in (("parameters", choice.parameters), ("multiply-adds", choice.macs)):
        if after >= before and (macs or what == "parameters"):
            made = choice.form or f"rank {' x '.join(map(str, choice.ranks))}"
            return Choice(choice.path, reason=f"{made} would not save {what} ({before:,} -> {after:,})")
    return choice


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
        if not _is_layer(layer):
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


def _is_layer(layer: nn.Module) -> bool:
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
    flattened = _Flattened()

    def note(path: str) -> Any:
        def hook(layer: Any, inputs: Any, output: Tensor) -> None:
            given, calls = inputs[0], 1 + (seen[path].calls if path in seen else 0)
            order = seen[path].order if path in seen else len(seen)
            taken = flattened.maps.get((given.data_ptr(), given.shape[-1]), ()) if given.ndim == 2 else ()
            if calls > 1 and taken != seen[path].map:
                taken = ()
            places = (_positions(layer, given), _positions(layer, output))
            sizes = {"space": _space(layer, given), "made": _space(layer, output)}
            seen[path] = Seen(path, layer, order, calls, *places, first=False, final=False, map=taken, **sizes)

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
    last = {size for result in results if isinstance(result, Tensor) for size in result.shape[1:2] + result.shape[-1:]}
    first = next((one for one in seen.values() if not isinstance(one.layer, nn.Linear)), None)
    return tuple(replace(one, first=one is first, final=one.layer.weight.shape[0] in last) for one in seen.values())


def _positions(layer: Any, value: Tensor) -> int:
    """Positions of one sample at which a layer is applied: those of space, or of a sequence."""
    return math.prod(value.shape[1:-1] if isinstance(layer, nn.Linear) else _space(layer, value))


def _space(layer: Any, value: Tensor) -> tuple[int, ...]:
    return () if isinstance(layer, nn.Linear) else tuple(value.shape[-len(layer.kernel_size) :])


def groups_of(one: Seen) -> int:
    """How many blocks the layer's weight has."""
    return 1 if isinstance(one.layer, nn.Linear) else one.layer.groups


def filters_of(one: Seen) -> int:
    """How many filters each of its groups has."""
    return one.layer.weight.shape[0] // groups_of(one)


def blocks(layer: Any) -> Float[Tensor, "groups rows columns"]:
    """The weight of a linear layer or convolution as one matrix (filters x all else) for each group, in float64."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return split_groups(layer.weight.detach().double(), groups).flatten(2)


def factor_matrix(layer: Any, rank: int, *, balanced: bool = False) -> tuple[nn.Module, float]:
    """A linear layer or convolution as two, by SVD of filters x all else, group by group, and its relative error.

    The first factor sees what the layer saw, the second one is pointwise.
    """
    parts = [truncated_svd(block, rank) for block in blocks(layer)]
    pairs = [part.factors(balanced=balanced) for part in parts]
    left, right = torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
    lost = sum(float(part.discarded.square().sum()) for part in parts)
    error = math.sqrt(lost / max(float(blocks(layer).square().sum()), 1e-300))
    if isinstance(layer, nn.Linear):
        return factor_linear(layer, left[0], right[0]), error
    return factor_conv(layer, right.reshape(*right.shape[:2], *layer.weight.shape[1:]), outer=left), error


def require_ranks(paths: Sequence[str], seen: Sequence[Seen], left: Sequence[Choice]) -> None:
    """Refuse ranks for layers that cannot be factored, with the reason."""
    known = {choice.path: choice.reason for choice in left}
    for path in paths:
        found = any(one.path == path for one in seen)
        why = known.get(path, "there is no such layer with a weight")
        require(found, f"ranks names '{path}', which cannot be factored: {why}")


def require_fine_tuning(epochs: int, learning_rate: float | None) -> None:
    """Refuse impossible settings of the fine-tuning."""
    require_passes(epochs=epochs)
    positive = learning_rate is None or learning_rate > 0
    require(positive, f"learning_rate is {learning_rate}; give a positive number, for example 0.001")


def carry_out(
    model: Model, choices: Sequence[Choice], layers: Mapping[str, nn.Module], name: str, extra: Mapping[str, Any]
) -> Model:
    """The model with its new layers, and a note of what was done with every layer."""
    text = f"{name}: {len(layers)} of {len(choices)} layers factored"
    new = replace_layers(model, layers, text) if layers else model
    told = {
        **extra,
        "factored": [choice.to_json() for choice in choices if choice.replaced],
        "left": [choice.to_json() for choice in choices if not choice.replaced],
        "parameters": [model.parameters, new.parameters],
    }
    return new.evolve(new.module, Note(f"{text}, {model.parameters:,} -> {new.parameters:,} parameters", told))


def fine_tune(
    model: Model,
    bench: Bench,
    epochs: int,
    learning_rate: float | None,
    label: str,
    *,
    influence: Influence | None = None,
) -> Model:
    """The model trained for `epochs`, at a learning rate of its own if one is given, under an influence if there is."""
    if not epochs:
        return model
    if learning_rate is not None:
        optimizer = replace(bench.training.optimizer, lr=learning_rate)  # pyright: ignore[reportArgumentType]
        bench = replace(bench, training=replace(bench.training, optimizer=optimizer))
    return bench.fit(model, epochs=epochs, influence=influence, label=label)


def require_data(slug: str, model: Model, bench: Bench, epochs: int) -> None:
    """Refuse fine-tuning without data or a task before any work."""
    if epochs:
        hint = "Give Bench(train=...), --data on the command line, or epochs=0."
        require(bench.train is not None, f"'{slug}' needs training data to fine-tune.", hint, NeedError)
        hint = "Give Model(..., task=karui.Classification()), another task, or epochs=0."
        require(model.task is not None, f"'{slug}' needs a task to fine-tune for.", hint, NeedError)


def tracked(items: Sequence[Any], text: str, *, shown: bool) -> Iterable[Any]:
    """The items, with a progress bar if it is to be shown."""
    from rich.progress import track

    return _plain(items) if not shown else track(items, description=text)


def _plain(items: Sequence[Any]) -> Iterator[Any]:
    yield from items


RATIOS = (0.75, 0.5, 0.375, 0.25, 0.125)
"""Shares of the full rank that are offered as candidates."""


def rank_ladder(full: int, multiple: int) -> tuple[int, ...]:
    """Ranks below the full one at the shares of `RATIOS`: multiples of `multiple` where the full rank holds several.

    Example:
        >>> rank_ladder(64, 8), rank_ladder(10, 8)
        ((48, 32, 24, 16, 8), (8, 5, 4, 3, 2))
    """
    ranks = [math.ceil(full * ratio) for ratio in RATIOS]
    aligned = [math.ceil(rank / multiple) * multiple if full >= 2 * multiple else rank for rank in ranks]
    return tuple(dict.fromkeys(rank for rank in aligned if rank < full))

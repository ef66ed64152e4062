"""Latent weights: layers that compute with quantised weights and inputs while their real weights collect the updates.

The quantisers are values that are called with a tensor and let a gradient through
(`karui.numerics.straight_through`). Afterwards the layers have their latent weights again, so that a next training
goes on from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from karui.errors import SettingError, require
from karui.model import layer_at
from karui.train.influence import Influence

Quantiser = Callable[[Tensor], Tensor]
"""A tensor in, the quantised one out, differentiable. A value: the same call gives the same."""


@dataclass(frozen=True)
class Grids:
    """What a layer computes with.

    Settings:
        weight: makes the weight of the latent one; None leaves it.
        inputs: makes the layer's (first) input of the given one; None leaves it.
    """

    weight: Quantiser | None = None
    inputs: Quantiser | None = None


@dataclass(frozen=True, eq=False)
class LatentWeights(Influence):
    """Layers compute on grids while they train; their latent weights learn, and are what is left afterwards.

    Settings:
        layers: by path, what each layer computes with.

    Example:
        >>> import torch
        >>> from karui.numerics.straight_through import WeightGrid
        >>> net = nn.Linear(2, 1, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[0.3, -0.1]]))
        >>> latent = LatentWeights({"": Grids(WeightGrid(1))})
        >>> latent.attach(net)
        >>> net.weight.tolist()
        [[1.0, -1.0]]
        >>> [round(w, 1) for w in latent.finish(net).weight[0].tolist()]
        [0.3, -0.1]
    """

    layers: Mapping[str, Grids]

    def attach(self, module: nn.Module) -> None:
        """Put the quantisers between latent weights and layers, and before the inputs.

        Raises:
            SettingError: a layer has no weight, or one that is made of others already.
        """
        for path, grids in self.layers.items():
            layer: Any = layer_at(module, path, SettingError)
            if grids.weight is not None:
                require(
                    isinstance(getattr(layer, "weight", None), nn.Parameter),
                    f"The layer '{path}' ({type(layer).__name__}) has no weight of its own to quantise.",
                    "Leave it out, or remove its parametrisation.",
                    SettingError,
                )
                parametrize.register_parametrization(layer, "weight", _Latent(grids.weight))
            if grids.inputs is not None:
                layer.register_forward_pre_hook(_Narrow(grids.inputs), with_kwargs=True)

    def finish(self, module: nn.Module) -> nn.Module:
        """Take the quantisers off; latent weights stay."""
        for path, grids in self.layers.items():
            layer = module.get_submodule(path)
            if grids.weight is not None:
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
                own = layer._parameters  # noqa: SLF001  (the weight comes back last, and was first)
                own.update({name: own.pop(name) for name in list(own) if name != "weight"})
            hooks = layer._forward_pre_hooks  # noqa: SLF001  (a handle would be state of the influence)
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Narrow)]:
                del hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)  # noqa: SLF001
        return module


class _Latent(nn.Module):
    """The step from a latent weight to what its layer computes with."""

    def __init__(self, quantiser: Quantiser) -> None:
        super().__init__()
        self.quantiser = quantiser

    def forward(self, latent: Tensor) -> Tensor:
        return self.quantiser(latent)


class _Narrow:
    """A hook that quantises a layer's first input, and knows its own kind."""

    def __init__(self, quantiser: Quantiser) -> None:
        self.quantiser = quantiser

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        del layer
        if args:
            return (self.quantiser(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": self.quantiser(kwargs["input"])}

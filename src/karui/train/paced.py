"""Learning rates of single layers: held back, or held still."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from karui.errors import require
from karui.model.taps import layer_at
from karui.train.influence import Influence, Moment

_PREFIX = "karui_before_"


@dataclass(frozen=True)
class Paced(Influence):
    """Layers at `paths` move by the share `rate` of each step that the optimizer takes; 0 holds them still.

    It is their learning rate, in proportion to the others', for any optimizer: the whole step is scaled, with momentum
    and weight decay. Batch normalisation that is held still also keeps its running statistics, and normalises by them.

    Settings:
        paths: names of layers; all that lies within them is paced.
        rate: share of each step, 0 or more.

    Raises:
        SettingError: the rate is negative.
        UsageError: there is no layer at a path.
    """

    paths: tuple[str, ...]
    rate: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", tuple(self.paths))
        require(self.rate >= 0, f"rate is {self.rate}; give 0 or more, for example 0.1")

    def attach(self, module: nn.Module) -> None:
        """Remember where the parameters are, in buffers, which a checkpoint holds."""
        for layer, name, value in self._paced(module):
            layer.register_buffer(_PREFIX + name, value.detach().clone(), persistent=False)
        if not self.rate:
            for layer in self._layers(module):
                if isinstance(layer, _BatchNorm):
                    layer.register_forward_pre_hook(_still)

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        """Take back the rest of the step."""
        del moment
        for layer, name, value in self._paced(module):
            before: Any = getattr(layer, _PREFIX + name)
            value.copy_(before.lerp(value, self.rate) if self.rate else before)
            before.copy_(value)

    def finish(self, module: nn.Module) -> nn.Module:
        """Forget the buffers and the hooks."""
        for layer, name, _ in self._paced(module):
            delattr(layer, _PREFIX + name)
        for layer in self._layers(module):
            for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _still]:  # noqa: SLF001
                del layer._forward_pre_hooks[key]  # noqa: SLF001
        return module

    def _layers(self, module: nn.Module) -> list[nn.Module]:
        """Each layer at or below a path, once."""
        return list(dict.fromkeys(layer for path in self.paths for layer in layer_at(module, path).modules()))

    def _paced(self, module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
        seen = set()
        for layer in self._layers(module):
            for name, value in list(layer.named_parameters(recurse=False)):
                if id(value) not in seen and value.requires_grad:
                    seen.add(id(value))
                    yield layer, name, value


def _still(layer: nn.Module, inputs: Any) -> None:
    """Normalise by the running statistics, and leave them, in a network that is set to train."""
    del inputs
    layer.training = False

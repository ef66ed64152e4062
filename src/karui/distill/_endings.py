"""Which non-linearity a layer's output has passed through last, be it a module or a function."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from karui.model import Model
from karui.train.guide import Guide

Kind = Literal[
    "none", "relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "gelu", "silu", "mish", "softplus", "sigmoid",
    "tanh", "hardtanh", "hardsigmoid", "hardswish",
]  # fmt: skip
MADE: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "prelu": nn.PReLU,
    "elu": nn.ELU, "selu": nn.SELU, "gelu": nn.GELU, "silu": nn.SiLU, "mish": nn.Mish, "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "hardtanh": nn.Hardtanh, "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
}  # fmt: skip
"""The kinds of activation that a regressor may end with, by the names of their settings."""
_RECORDED: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "Relu": (nn.ReLU, ()),
    "LeakyRelu": (nn.LeakyReLU, ("negative_slope",)),
    "PreluKernel": (nn.PReLU, ()),
    "Elu": (lambda alpha, scale: nn.ELU(alpha) if scale == 1 else nn.SELU(), ("alpha", "scale")),
    "Gelu": (nn.GELU, ("approximate",)),
    "Silu": (nn.SiLU, ()),
    "Mish": (nn.Mish, ()),
    "Softplus": (nn.Softplus, ("beta", "threshold")),
    "Sigmoid": (nn.Sigmoid, ()),
    "Tanh": (nn.Tanh, ()),
    "Hardtanh": (nn.Hardtanh, ("min_val", "max_val")),
    "Hardsigmoid": (nn.Hardsigmoid, ()),
    "Hardswish": (nn.Hardswish, ()),
}
"""By autograd's name of a step, the module that does it, and what of its settings the step keeps."""
_LINEAR = re.compile(r"Addmm|Mm|Bmm|Baddbmm|Convolution|(Native|Cudnn|Miopen)\w*Norm|FusedRmsNorm")
"""Steps that are none: products with weights, and normalisation."""
_KEEPING = re.compile(
    r"(Unsafe)?View|Reshape\w*|Transpose|Permute|T|Clone|Slice|Select|Squeeze|Unsqueeze|Expand|Alias|Mean|\w*Pool\w*"
)
"""Steps that keep the range of the numbers: those that move them, and pooling."""


def ending(model: Model, path: str, output_of: Callable[..., Any], first: Callable[[Any], Any]) -> nn.Module | None:
    """The non-linearity of a layer, anew; `nn.Identity` where it has none, None where it is not known.

    It is read from autograd's record of the output, so that functions and modules alike are found, with their settings;
    through what follows them without changing their range, such as pooling.

    Args:
        model: the network; left as it is.
        path: of the layer.
        output_of: gives the output of a layer of a module, `(module, path, inputs)`.
        first: makes a tensor of it.

    Example:
        >>> from karui.distill.hint import output_of
        >>> net = nn.Sequential(nn.Linear(3, 3), nn.Softplus(2.0), nn.Linear(3, 1))
        >>> model = Model(net, example=(torch.zeros(2, 3),))
        >>> [ending(model, path, output_of, lambda x: x) for path in ("0", "1")]
        [Identity(), Softplus(beta=2.0, threshold=20.0)]
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        module = Guide(model).module  # frozen: the record is of the inputs' gradient
        inputs = tuple(_wanting(x) if isinstance(x, Tensor) else x for x in model.example)
        words = [part for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
        handles = [part.register_forward_hook(_spoken) for part in words]
        try:
            output = first(output_of(module, path, inputs))
        finally:
            for handle in handles:
                handle.remove()
        return _made(output.grad_fn) if isinstance(output, Tensor) and output.requires_grad else None


def _wanting(x: Tensor) -> Tensor:
    """The same numbers, as the start of a record; tokens have none. What comes next may write over them."""
    return x.detach().requires_grad_().clone() if x.is_floating_point() else x.clone()


def _spoken(layer: nn.Module, inputs: Any, output: Any) -> Any:
    del layer, inputs
    return _wanting(output)


def _made(step: Any) -> nn.Module | None:
    """The non-linearity of the last step that is told by its name."""
    while step is not None:
        name = re.sub(r"Backward\d*$", "", step.name())
        if name in _RECORDED:
            make, settings = _RECORDED[name]
            return make(*(getattr(step, f"_saved_{setting}") for setting in settings))
        if _LINEAR.fullmatch(name) or name.endswith("AccumulateGrad"):
            return nn.Identity()
        if not _KEEPING.fullmatch(name):
            return None
        step = step.next_functions[0][0] if step.next_functions else None
    return nn.Identity()

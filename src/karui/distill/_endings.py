"""Which non-linearity a layer's output has passed through last, be it a module or a function."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from karui.model import Model, layer_at

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
_LINEAR = re.compile(r"Addmm|Mm|Bmm|Baddbmm|Convolution|(Native|Cudnn|Miopen)\w*Norm|FusedRmsNorm|Embedding")
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
        module = model.copy().module.eval()
        layer_at(module, path)
        for parameter in module.parameters():
            parameter.requires_grad_()
        inputs = tuple(x.clone() if isinstance(x, Tensor) else x for x in model.example)
        output = first(output_of(module, path, inputs))
        step = output.grad_fn if isinstance(output, Tensor) else None
        while step is not None:
            name = re.sub(r"Backward\d*$", "", step.name())
            if name in _RECORDED:
                make, settings = _RECORDED[name]
                return make(*(getattr(step, f"_saved_{setting}") for setting in settings))
            if _LINEAR.fullmatch(name):
                return nn.Identity()
            if not _KEEPING.fullmatch(name):
                return None
            step = step.next_functions[0][0] if step.next_functions else None
    return None

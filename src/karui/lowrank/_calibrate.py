"""What layers see and give on calibration inputs, in the original and in the compressed network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from karui.lowrank._scan import Seen, filters_of, groups_of
from karui.model.following import Following
from karui.model.responses import draw_positions, patches_at, responses, rows_at, watch_outputs
from karui.numerics.regression import Moments

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench

RIDGE = 0.01
"""Isotropic inputs that are added to those seen, as a share of their mean variance, where a fit would else be free."""


@dataclass(frozen=True)
class Calibration:
    """Where a layer is looked at: random positions of its output, on inputs of the training data, without labels.

    Settings:
        model: the original network.
        bench: its training data and its seed.
        images: how many inputs.
        positions: how many positions of each.
    """

    model: Model
    bench: Bench
    images: int
    positions: int

    def outputs(
        self, current: Model, one: Seen, following: Following
    ) -> Iterator[tuple[Float[Tensor, "rows outputs"], Float[Tensor, "rows outputs"]]]:
        """Responses of the layer in `current` and in the original, behind its batch normalisation, batch by batch."""
        generator = torch.Generator().manual_seed(self.bench.seed)
        batches = self.bench.calibration(self.images)
        for response in responses(self.model.module, current.module, one.path, batches, calls=one.calls):
            index = draw_positions(response.wanted, one.layer, self.positions, generator)
            made, wanted = (rows_at(side, one.layer, index) for side in (response.made, response.wanted))
            yield following.normalised(made), following.normalised(wanted)

    def energies(
        self, layers: Sequence[Seen], after: Mapping[str, Following]
    ) -> dict[str, Float[Tensor, "directions"]]:
        """Eigenvalues of the covariance of each layer's responses in the original, falling; those of its groups added.

        One run of the network serves all layers.
        """
        moments = {one.path: _no_moments(one) for one in layers}
        generator = torch.Generator().manual_seed(self.bench.seed)

        def watcher(one: Seen) -> Callable[[Tensor], None]:
            def watch(output: Tensor) -> None:
                index = draw_positions(output, one.layer, self.positions, generator)
                rows = after[one.path].normalised(rows_at(output, one.layer, index))
                for part, into in zip(rows.chunk(groups_of(one), 1), moments[one.path], strict=True):
                    into.add(part[:, :0], part)

            return watch

        watchers = {one.path: watcher(one) for one in layers}
        watch_outputs(self.model.module, watchers, self.bench.calibration(self.images))
        values = {
            path: [torch.linalg.eigvalsh(group.centred().yy).flip(0).clamp(min=0) for group in found]
            for path, found in moments.items()
        }
        return {path: torch.stack(found).sum(0) for path, found in values.items()}

    def moments(self, current: Model, one: Seen) -> list[Moments]:
        """Of what each group of a layer sees in `current`, flat, and what it gives in the original, bias included."""
        generator = torch.Generator().manual_seed(self.bench.seed)
        batches = self.bench.calibration(self.images)
        groups, each = groups_of(one), one.layer.weight[0].numel()
        moments = [Moments.zeros(each, one.layer.weight.shape[0] // groups) for _ in range(groups)]
        for response in responses(self.model.module, current.module, one.path, batches, calls=one.calls):
            index = draw_positions(response.wanted, one.layer, self.positions, generator)
            seen = patches_at(response.given, one.layer, index).flatten(1).unflatten(1, (groups, each))
            wanted = rows_at(response.wanted, one.layer, index).unflatten(1, (groups, -1))
            for group, into in enumerate(moments):
                into.add(seen[:, group], wanted[:, group])
        return moments


def regularised(moments: Moments, weight: Float[Tensor, "filters *seen"], *, centred: bool) -> Moments:
    """With a little of isotropic inputs, to which the weight itself responds.

    Directions in which the calibration inputs hardly vary would else be free to take any size, and inputs that do vary
    in them would meet it.

    Args:
        moments: of one group.
        weight: of that group, before the fit.
        centred: whether variance counts around the means, as where a bias is fitted too, or around zero.
    """
    seen = moments.centred().xx if centred else moments.xx / moments.count
    return moments.with_isotropic(weight.flatten(1), RIDGE * float(seen.diagonal().mean()))


def _no_moments(one: Seen) -> list[Moments]:
    return [Moments.zeros(0, filters_of(one)) for _ in range(groups_of(one))]

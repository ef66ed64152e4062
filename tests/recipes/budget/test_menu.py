"""The menu: what is refused when it is carried out is not offered again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from karui.architectures.cifar_resnet import cifar_resnet
from karui.errors import SurgeryError
from karui.model import Classification, Model, coupled_groups
from karui.recipes.budget.cache import TimingCache
from karui.recipes.budget.cells import Cells
from karui.recipes.budget.choice import Problem, choose
from karui.recipes.budget.menu import Menu, Offer
from karui.recipes.budget.skips import LeaveOut
from karui.recipes.budget.tables import Coster
from karui.recipes.budget.timing import Stopwatch
from karui.technique import Candidate


def test_a_replacement_that_the_cuts_leave_no_room_for_is_not_offered_again():
    """A shortcut that pads with zeros freezes sizes; the graph that the cut leaves does not call the block any more."""
    torch.manual_seed(0)
    model = Model(cifar_resnet(8).eval(), example=(torch.zeros(1, 3, 32, 32),), task=Classification())
    makers = (
        Candidate(
            place="layer2.0.conv2",
            technique=LeaveOut(part="layer1.0"),
            text="",
            cut={"layer2.0.conv2": torch.arange(4)},
        ),
        Candidate(
            place="layer1.0", technique=LeaveOut(part="layer1.0"), text="", layers=lambda: {"layer1.0": nn.Identity()}
        ),
    )
    places = ("units of layer2.0.conv2", "layer layer1.0")
    offers = {
        place: (Offer(candidate=candidate, harm=0.1, seconds=-1.0, bytes=-1.0),)
        for place, candidate in zip(places, makers, strict=True)
    }
    menu = Menu(model=model, offers=offers, tables=(), analysis=coupled_groups(model))
    with pytest.raises(SurgeryError, match="does not call"):
        menu.carry_out(dict.fromkeys(places, 1))
    assert menu.failed == {places[1]}
    assert menu.carry_out({places[0]: 1, places[1]: 0}).parameters < model.parameters
    left = choose(menu.problem({}))
    assert left is not None
    assert left[places[1]] == 0


class Tied(nn.Module):
    """An embedding and a linear layer that write into one vector: units of both go together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.e, self.b = nn.Linear(16, 32), nn.Embedding(5, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x) + self.e(k)))


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("cut_layer", ["a", "e"])
def test_a_new_layer_does_not_go_with_a_cut_of_the_one_that_it_replaces(cut_layer: str):
    """Also where the cut reaches a layer that is not resized by itself, so that its cost is had as a whole."""
    torch.manual_seed(0)
    model = Model(Tied().eval(), example=(torch.randn(2, 16), torch.tensor([0, 1])))
    analysis = coupled_groups(model)
    (name,) = analysis.by_name

    def low_rank(outputs: int, inputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs))

    layers = {
        "a": Candidate(place="a", technique=LeaveOut(part="a"), text="rank 2", layers=lambda: {"a": low_rank(32, 16)}),
        "e": Candidate(
            place="e", technique=LeaveOut(part="e"), text="smaller", layers=lambda: {"e": nn.Embedding(5, 32)}
        ),
    }
    menu = {
        f"units of {name}": [
            Candidate(place=name, technique=LeaveOut(part="a"), text="half", cut={name: torch.arange(16)})
        ],
        f"layer {cut_layer}": [layers[cut_layer]],
    }
    coster = Coster(Cells(model, analysis, Stopwatch(cache=TimingCache())))
    coster.alone([candidate for candidates in menu.values() for candidate in candidates])
    problem = Problem(harms={place: [1.0, 0.0] for place in menu}, tables=coster.tables(menu))
    chosen = choose(problem)
    assert chosen is not None
    assert sorted(chosen.values()) == [0, 1]

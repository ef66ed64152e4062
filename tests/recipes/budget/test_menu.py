"""The menu: what is refused when it is carried out is not offered again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from karui.architectures.cifar_resnet import cifar_resnet
from karui.errors import SurgeryError
from karui.model import Classification, Model, coupled_groups
from karui.recipes.budget.choice import choose
from karui.recipes.budget.menu import Menu, Offer
from karui.recipes.budget.skips import LeaveOut
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

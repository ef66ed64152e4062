"""The plan says what can be cut and what cannot, by name, before anything is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from karui.errors import SurgeryError
from karui.model import Model, plan_surgery, remove_provable, remove_units


class Mixed(nn.Module):
    """One layer that is cut freely, one behind a reshape to a number, one behind an operator without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.frozen, self.odd, self.head = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.frozen(torch.tanh(self.free(x)))).reshape(-1, 8)
        return self.head(self.odd(x).sort(dim=1).values)


def test_plan_names_groups_forms_and_reasons() -> None:
    torch.manual_seed(0)
    model = Model(Mixed().eval(), example=(torch.randn(2, 3),))
    plan = plan_surgery(model)
    assert [(g.name, g.units, g.graph_form) for g in plan.groups] == [("free", 6, False), ("frozen", 8, True)]
    assert plan.groups[0].layers == ("free", "frozen")
    assert plan.groups[0].parameters == 3 + 1 + 8
    reasons = {r.name: r.reason for r in plan.refused}
    assert reasons["odd"] == "sort runs over it"
    assert reasons["head"] == "the model's output keeps its size"
    assert json.loads(json.dumps(plan.to_json()))["groups"][1]["name"] == "frozen"


class Silent(nn.Module):
    """Two branches, of which one never shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.tanh(self.c(x))) + 0 * self.b(self.a(x))


def test_plan_of_a_blind_group_refuses_it_and_keeps_the_others() -> None:
    plan = plan_surgery(Model(Silent(), example=(torch.randn(2, 3),)))
    assert [g.name for g in plan.groups] == ["c"]
    assert "do not show" in next(r.reason for r in plan.refused if r.name == "a")
    confirmed = plan.confirmed
    assert confirmed is not None
    assert [g.name for g in confirmed.groups] == ["c"]
    assert {"a", "d"} <= {lock.name for lock in confirmed.locked}


def test_what_can_be_cut_is_cut_and_the_rest_is_told() -> None:
    model = Model(Silent().eval(), example=(torch.randn(2, 3),))
    light, whole = remove_provable(model, {"a": torch.tensor([1, 2]), "c": torch.tensor([0])})
    assert list(whole) == ["a"]
    assert "do not show" in whole["a"]
    assert light.module.get_submodule("a").out_features == 5
    assert light.module.get_submodule("c").out_features == 3
    with pytest.raises(SurgeryError, match="do not show"):
        remove_provable(model, {"a": torch.tensor([1, 2])})


def test_weights_divided_by_their_norm_are_refused_with_that_reason() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    plan = plan_surgery(Model(net.eval(), example=(torch.randn(2, 3),)))
    assert not plan.groups
    (reason,) = [r.reason for r in plan.refused if r.name != "2"]
    assert "weight normalisation divides the weight of 0 by its norm" in reason
    assert "Cut of" not in reason
    nn.utils.parametrize.remove_parametrizations(net[0], "weight")
    folded = Model(net, example=(torch.randn(2, 3),))
    assert [group.name for group in plan_surgery(folded).groups] == ["0"]
    assert remove_units(folded, {"0": torch.tensor([1])}).module.get_submodule("0").out_features == 3


@pytest.mark.parametrize(
    ("normalise", "told", "groups"),
    [
        (nn.utils.parametrizations.weight_norm, "the norm that a weight is divided by", {"0"}),
        (nn.utils.parametrizations.spectral_norm, "the spectral norm that a weight is divided by", {"0", "2"}),
    ],
)
def test_what_the_norm_of_a_weight_counts_is_cut_on_demand_only(
    normalise: Callable[[nn.Module], nn.Module], told: str, groups: set[str]
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), normalise(nn.Linear(6, 4)), nn.ReLU(), nn.Linear(4, 2)).eval()
    model = Model(net, example=(torch.randn(2, 3),))
    found = {group.name.removesuffix(".parametrizations.weight"): group for group in plan_surgery(model).groups}
    assert set(found) == groups
    for group in found.values():
        assert not group.exact
        assert told in group.note
        with pytest.raises(SurgeryError, match="normalisation"):
            remove_units(model, {group.name: torch.tensor([1])})
        light = remove_units(model, {group.name: torch.tensor([1])}, allow_normalisation=True)
        assert light.parameters < model.parameters


def test_plan_says_what_is_lost_without_a_capture() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else x

    plan = plan_surgery(Model(Branching(), example=(torch.randn(2, 3),)))
    assert not plan.groups
    assert "techniques that work layer by layer still can" in plan.lost


def test_outputs_in_which_no_tensor_is_found_are_told() -> None:
    @dataclass
    class Out:
        logits: Tensor

    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Out:
            return Out(self.b(self.a(x)))

    plan = plan_surgery(Model(Wrapping(), example=(torch.randn(2, 3),)))
    assert not plan.groups
    assert "The model gives a Out, in which no tensor is found" in plan.lost


class Bags(nn.Module):
    """Sums of embeddings by an operator that labels know nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(20, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(x))


def test_a_layer_that_only_an_unknown_operator_reads_is_named() -> None:
    plan = plan_surgery(Model(Bags().eval(), example=(torch.randint(0, 20, (2, 5)),)))
    assert not plan.groups
    told = [(row.name, row.units) for row in plan.refused if "_embedding_bag" in row.reason]
    assert told == [("words", 20), ("words", 8)]

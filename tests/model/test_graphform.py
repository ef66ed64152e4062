"""The graph form: trainable, exportable, copied, replayed, cut again, with a dynamic batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import ArtifactError, SurgeryError
from karui.model import Cut, GraphForm, Model, coupled_groups, edit_from_json, edit_to_json, remove_units
from karui.model.rewrite import apply_rewrites


class Frozen(nn.Module):
    """Sizes written in Python, a batch normalisation, dropout, and a path that only training takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.drop = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.2)
        self.b, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(functional.relu(self.bn(self.a(x))))
        x = x.reshape(-1, 8, 16).reshape(-1, 8, 4, 4)
        y = self.head(self.b(x).reshape(-1, 6 * 16))
        return y + x.mean((1, 2, 3), keepdim=False)[:, None] * 0 if self.training else y


@pytest.fixture(scope="module")
def light() -> Model:
    torch.manual_seed(0)
    dense = Model(Frozen().eval(), example=(torch.randn(1, 3, 4, 4),))
    return remove_units(dense, {"a": torch.tensor([0, 5]), "b": torch.tensor([2])}, allow_normalisation=True)


def test_own_forward_cannot_run_so_the_graph_form_does(light: Model) -> None:
    assert isinstance(light.module, GraphForm)
    assert light.module.a.weight.shape == (6, 3, 3, 3)
    assert light.module(torch.randn(7, 3, 4, 4)).shape == (7, 3)


def test_layers_keep_their_names_and_are_called_whole(light: Model) -> None:
    seen = []
    module = copy.deepcopy(light.module)
    module.b.register_forward_hook(lambda *_: seen.append("b"))
    module(torch.randn(2, 3, 4, 4))
    assert seen == ["b"]
    assert set(module.state_dict()) == set(Frozen().state_dict())


def test_it_trains_and_moves_running_statistics(light: Model) -> None:
    module = copy.deepcopy(light.module).train()
    before = module.bn.running_mean.clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x, target = torch.randn(8, 3, 4, 4), torch.randint(3, (8,))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = functional.cross_entropy(module(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None for p in module.parameters())
    assert losses[-1] < losses[0]
    assert not torch.equal(before, module.bn.running_mean)
    assert int(module.bn.num_batches_tracked) == 20
    module.eval()
    torch.testing.assert_close(module(x), module(x))


def test_copies_are_independent(light: Model) -> None:
    twin = copy.deepcopy(light.module)
    with torch.no_grad():
        twin.a.weight.zero_()
    assert not torch.equal(twin.a.weight, light.module.a.weight)
    x = torch.randn(2, 3, 4, 4)
    assert not torch.allclose(twin(x), light.module(x))


def test_it_exports_with_a_dynamic_batch(light: Model) -> None:
    batch = torch.export.Dim("batch")
    exported = torch.export.export(light.module.eval(), (torch.randn(2, 3, 4, 4),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(exported.module()(x), light.module(x))


def test_replay_from_json_computes_the_same(light: Model) -> None:
    step = edit_from_json(edit_to_json(light.lineage[0]))
    again = step.replay(Frozen(), light.example)
    assert isinstance(again, GraphForm)
    again.load_state_dict(light.module.state_dict())
    x = torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(again.eval()(x), light.module.eval()(x))


def test_it_can_be_cut_again(light: Model) -> None:
    found = coupled_groups(light)
    assert {g.name: g.size for g in found} == {"a": 6, "b": 5}
    lighter = remove_units(light, {"b": torch.tensor([0])}, analysis=found)
    assert lighter.module(torch.randn(2, 3, 4, 4)).shape == (2, 3)
    assert [type(step) for step in lighter.lineage] == [Cut, Cut]


def test_rewrites_for_another_program_are_refused(light: Model) -> None:
    step = light.lineage[0]
    assert isinstance(step, Cut)
    broken = Cut(
        step.kept, step.sizes, step.removed, [[["no_such", "aten.view.default", "aten.view.default", [], {}]]] * 2
    )
    with pytest.raises(ArtifactError, match="no_such"):
        broken.replay(Frozen(), light.example)
    assert callable(apply_rewrites)


def test_a_frozen_batch_has_no_graph_form() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).view(2, 8))

    model = Model(Single(), example=(torch.randn(2, 3),))
    with pytest.raises(SurgeryError, match="fixes the batch size"):
        remove_units(model, {"a": torch.tensor([0])})


def test_a_batch_normalisation_that_is_no_layer_of_torch_trains_too() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    class Reshaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.b = nn.Conv2d(3, 6, 1), Own(6), nn.Linear(6 * 16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.bn(self.a(x)).reshape(-1, 6 * 16))

    torch.manual_seed(0)
    dense = Model(Reshaped().eval(), example=(torch.randn(1, 3, 4, 4),))
    module = remove_units(dense, {"a": torch.tensor([1, 2])}).module
    x = torch.randn(8, 3, 4, 4) * 3 + 1
    module.train()
    one = module(x)
    assert int(module.bn.num_batches_tracked) == 1
    assert float(module.bn.running_mean.abs().max()) > 0
    expected = module.b(module.bn(module.a(x)).flatten(1))
    torch.testing.assert_close(one, expected)
    assert not torch.allclose(module.eval()(x), one)


class Projecting(nn.Module):
    """An LSTM whose outputs are projected: cut, it takes its graph form, which makes the first state itself."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 12, 2, batch_first=True, proj_size=6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_graph_form_follows_a_change_of_precision() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4)
    dense = Model(Projecting().eval(), (x[:1],))
    form = remove_units(dense, {"rnn": torch.tensor([0, 5]), "rnn#2": torch.tensor([1])}).module
    assert isinstance(form, GraphForm)
    with torch.no_grad():
        single, wide = form(x), copy.deepcopy(form).double()
        assert wide(x.double()).dtype is torch.float64
        assert torch.allclose(wide(x.double()), single.double(), atol=1e-6)
        assert torch.equal(wide.float()(x), single)
        assert wide.bfloat16()(x.bfloat16()).dtype is torch.bfloat16
        assert torch.equal(form(x), single)  # the copy's programs are its own
    groups = coupled_groups(Model(form, (x[:1],)))
    again = remove_units(Model(form, (x[:1],)), {g.name: torch.tensor([0]) for g in groups}, analysis=groups)
    assert again.parameters < sum(p.numel() for p in form.parameters())


class LastStep(nn.Module):
    """Reads the last step forwards and the first one backwards: numbers that hang on the length."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(8, 12, bidirectional=True, batch_first=True), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.out(torch.cat([y[:, -1, :12], y[:, 0, 12:]], 1))


def test_another_size_than_the_examples_is_refused_and_not_computed_wrongly() -> None:
    torch.manual_seed(0)
    light = remove_units(Model(LastStep().eval(), example=(torch.randn(2, 5, 8),)), {"rnn": torch.tensor([0])})
    assert isinstance(light.module, GraphForm)
    assert light.module(torch.randn(4, 5, 8)).shape == (4, 3)
    for module in (light.module, copy.deepcopy(light.module)):
        for length in (4, 7):
            with pytest.raises(SurgeryError, match=rf"inputs of 5x8 beside the batch, and was given {length}x8"):
                module(torch.randn(4, length, 8))

"""What the techniques of the room offer to a budget: layers that do less work, each made by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.architectures.cifar_resnet import cifar_resnet
from karui.lowrank import LowRankExpansion, ProductQuantization, product_quantization
from karui.lowrank._per_layer import Offering, PerLayer
from karui.measuring import count
from karui.model import Classification, Model
from karui.recipes.budget import harm
from karui.recipes.budget.menu import collect
from karui.technique import Bench, Candidate, card_of

SLUGS = (
    "asymmetric_nonlinear",
    "biclustered_cp",
    "biclustered_svd",
    "cp_decomposition",
    "group_brain_damage",
    "low_rank_expansion",
    "low_rank_sparse",
    "monochromatic",
    "product_quantization",
    "separable_filters",
    "tucker2",
)


@pytest.fixture(scope="module")
def resnet8() -> Model:
    torch.manual_seed(0)
    module = cifar_resnet(8).eval()
    return Model(module, example=(torch.zeros(1, 3, 32, 32),), task=Classification())


@pytest.fixture(scope="module")
def bench() -> Bench:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(48, 3, 32, 32, generator=generator)
    return Bench(train=TensorDataset(pictures, torch.arange(48) % 10))


@pytest.fixture(scope="module")
def offered(resnet8: Model, bench: Bench) -> dict[str, list[Candidate]]:
    found: dict[str, list[Candidate]] = {}
    for candidate in collect(resnet8, bench, 8)[0]:
        card = card_of(candidate.technique)
        if card is not None:  # what leaves a part out is no technique of a paper
            found.setdefault(card.slug, []).append(candidate)
    return found


@pytest.mark.parametrize("slug", SLUGS)
def test_the_menu_holds_smaller_layers_of_every_technique(
    slug: str, resnet8: Model, bench: Bench, offered: dict[str, list[Candidate]]
):
    assert offered.get(slug), f"{slug} offers nothing"
    for candidate in offered[slug]:
        ((path, layer),) = made(candidate).items()
        old: Any = resnet8.module.get_submodule(path)
        x = torch.randn(2, old.in_channels, 8, 8) if isinstance(old, nn.Conv2d) else torch.randn(2, old.in_features)
        assert layer(x).shape == old(x).shape
        sizes = [sum(p.numel() for p in one.parameters()) for one in (old, layer)]
        assert sizes[1] < sizes[0]
        if slug != "product_quantization":
            macs = [count(Model(one, example=(x[:1],))).macs for one in (old, layer)]
            assert macs[1] < macs[0]


@pytest.mark.parametrize("slug", [slug for slug in SLUGS if slug != "tucker2"])
def test_the_settings_of_a_candidate_do_just_this_and_no_more(
    slug: str, resnet8: Model, bench: Bench, offered: dict[str, list[Candidate]]
):
    candidate = offered[slug][-1]
    light = candidate.technique.apply(resnet8, bench)
    ((path, layer),) = made(candidate).items()
    ours, theirs = (dict(one.named_parameters()) for one in (layer, light.module.get_submodule(path)))
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    before, after = (dict(one.module.named_parameters()) for one in (resnet8, light))
    others = [name for name in before if not name.startswith(f"{path}.")]
    assert all(torch.equal(before[name], after[name]) for name in others)
    worst = max(float((ours[name] - theirs[name]).detach().abs().max()) for name in ours)
    assert worst < 1e-3, f"the layer of the menu is not the one that its settings make ({worst})"


def test_kernels_that_are_closest_in_closed_form_are_offered_as_such(resnet8: Model, bench: Bench):
    path = "layer3.0.conv2"
    mild, strong = [c for c in LowRankExpansion().candidates(resnet8, bench) if c.place == path]
    old: Any = resnet8.module.get_submodule(path)
    x = torch.randn(1, old.in_channels, 8, 8)
    with torch.no_grad():
        errors = [float((made(one)[path](x) - old(x)).norm()) for one in (mild, strong)]
    assert errors[0] < errors[1]


def test_layers_that_a_budget_may_not_gain_by_are_never_built(resnet8: Model, bench: Bench):
    thin = Model(nn.Conv2d(2, 2, 3), example=(torch.zeros(1, 2, 8, 8),))
    assert list(LowRankExpansion().candidates(thin, bench)) == []
    assert list(ProductQuantization().candidates(thin, bench)) == []


@pytest.mark.parametrize("base", [PerLayer, Offering])
def test_hooks_that_a_technique_must_give_are_asked_for_at_once(base: type):
    class Half(base):  # pyright: ignore[reportUntypedBaseClass]
        pass

    with pytest.raises(TypeError, match="abstract"):
        Half()


def made(candidate: Candidate) -> dict[str, nn.Module]:
    assert candidate.layers is not None
    layers: Any = candidate.layers()
    items: Iterable[tuple[str, nn.Module]] = layers.items()
    return dict(items)


@pytest.mark.paper(19)
def test_codewords_are_found_once_for_each_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A menu asks for a layer to time it, for each batch that tells its harm, and when it is chosen."""
    calls: list[Any] = []
    found = product_quantization.product_code
    monkeypatch.setattr(product_quantization, "product_code", lambda *given: calls.append(given) or found(*given))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    model = Model(net, example=(torch.zeros(1, 64),), task=Classification())
    rows = TensorDataset(torch.randn(300, 64), torch.arange(300) % 10)
    bench = Bench(train=rows)
    offered = list(ProductQuantization().candidates(model, bench))
    monkeypatch.setattr(harm, "BATCH", 32)
    harm.harms(model, offered, None, bench)
    assert len(calls) == len(offered) > 1
    maker = offered[0].layers
    assert maker is not None
    one, two = (next(iter(maker().values())) for _ in range(2))
    assert torch.equal(one.books, two.books)
    with torch.no_grad():
        one.books.zero_()
    assert not torch.equal(one.books, next(iter(maker().values())).books), "what is trained is another's"
    assert len(calls) == len(offered)

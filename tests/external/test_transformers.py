from __future__ import annotations

from pathlib import Path

import pytest
import torch

from karui.model import coupled_groups

why = "transformers is not installed (pip install 'karui[vision]')"
pytest.importorskip("transformers", reason=why, exc_type=ImportError)
pytestmark = pytest.mark.external

NET = """
from transformers import BertConfig, BertForSequenceClassification, BertModel


def config():
    return BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, num_labels=3,
    )


def classifier():
    return BertForSequenceClassification(config())


def encoder():
    return BertModel(config())
"""


@pytest.fixture
def bert(tmp_path: Path, public):
    """`bert(factory)`: a small random encoder with the tokens and the mask of two sentences, the second one shorter."""
    (tmp_path / "net.py").write_text(NET)
    draw = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    example = (torch.randint(1, 100, (2, 12), generator=draw), mask)
    return lambda factory: public(f"{tmp_path / 'net.py'}:{factory}", example)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "outputs"),
    [("classifier", ["logits"]), ("encoder", ["last_hidden_state", "pooler_output"])],
)
def test_an_encoder_is_planned_pruned_factorised_saved_loaded_and_exported(factory, outputs, bert, all_the_way) -> None:
    dense = bert(factory)
    light = all_the_way(dense)
    made = light.module(*dense.example)
    assert type(made) is type(dense.module(*dense.example))
    assert list(made) == outputs


def test_heads_and_inner_units_are_what_can_be_cut(bert) -> None:
    groups = coupled_groups(bert("classifier")).groups
    layer = "bert.encoder.layer.0"

    def sizes(path: str) -> list[int]:
        return sorted(group.size for group in groups if f"{layer}.{path}.weight" in group.sources)

    assert sizes("attention.self.query") == [4, 8]  # heads, and units within each
    assert sizes("attention.self.value") == [4, 8]
    assert sizes("intermediate.dense") == [64]

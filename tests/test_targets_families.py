"""Every family: what the hooks capture, what the head gives, and packed documents against each alone."""

from __future__ import annotations

import pytest
import torch
from conftest import token_batch
from family_world import FAMILIES, HYBRIDS, WRAPPERS, tiny_model

from deepspec.data.packing import Sample, lay_out
from deepspec.targets import Target
from deepspec.targets.adapters import TESTED_FAMILIES

LENGTHS = (11, 4, 1, 7)


def assert_same(found, expected):
    """To 1e-5 of the largest value: float32 sums in another order."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(scope="module", params=[*FAMILIES, *WRAPPERS])
def target(request):
    return Target(tiny_model(request.param), request.param)


def test_captured_layers_head_and_embedding_are_those_of_transformers(target):
    ids = torch.randint(1, 67, (2, 11), generator=torch.Generator().manual_seed(0))
    layer_ids = list(range(-1, target.num_layers - 1))
    with torch.no_grad():
        reference = target.model(input_ids=ids, output_hidden_states=True)
    features = target.features(token_batch(ids), layer_ids)
    assert_same(features.context, torch.cat(reference.hidden_states[:-1], dim=-1))
    assert_same(features.final, reference.hidden_states[-1])
    assert_same(target.logits(features.final), reference.logits)
    embedded = target.embedding_weight[ids] * target.adapter.embedding_scale(target.config)
    assert_same(embedded, reference.hidden_states[0])


def test_packed_documents_have_the_features_of_each_alone(target):
    ids = torch.randint(1, 67, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).split(LENGTHS)
    samples = [Sample(i, 0, str(i), ids[i].tolist(), [1] * n) for i, n in enumerate(LENGTHS)]
    layer_ids = [-1, 1, target.num_layers - 2]
    alone = [target.features(lay_out([[sample]], 0), layer_ids) for sample in samples]
    packed = lay_out([samples, samples[2:]], 0)
    features = target.features(packed, layer_ids)
    for document in packed.documents:
        for name in ("context", "final"):
            found = getattr(features, name)[document.row, document.columns]
            assert_same(found, getattr(alone[document.index], name)[0])
    assert features.final.isfinite().all()


def test_what_layers_remember_is_found(target):
    memory = target.memory
    types = getattr(target.config, "layer_types", None) or ["full_attention"] * target.num_layers
    stateful = [i for i, kind in enumerate(types) if kind in ("linear_attention", "conv")]
    assert sorted(memory.mixers) == stateful
    assert target.is_recurrent == (target.config.model_type in HYBRIDS)
    assert not set(memory.mixers) & set(memory.key_values)
    assert memory.key_values


def test_all_tested_families_are_tested():
    assert set(FAMILIES) == TESTED_FAMILIES

"""What a block may see, and that decoding sees the same as training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import TinyBatch, tiny_draft_config, tiny_target_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from deepspec.config import ConfigError
from deepspec.drafts import DSparkModel, build_draft
from deepspec.targets import Target

MakeDraft = Callable[..., DSparkModel]
VARIANTS = [
    {},
    {"family": "llama"},
    {"family": "llama", "target_changes": {"attention_bias": True, "mlp_bias": True}},
    {"sliding_window": 4},
    {"block_size": 1},
]


def run(draft: DSparkModel, batch: TinyBatch) -> Tensor:
    with torch.no_grad():
        return draft(**batch.for_backbone())


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_from_a_cache_equals_training(tiny_draft: MakeDraft, tiny_batch: TinyBatch, variant: dict) -> None:
    draft = tiny_draft(**variant)
    trained = run(draft, tiny_batch)
    rows, length = tiny_batch.input_ids.shape
    for block in range(2):  # both real in every row
        anchors = tiny_batch.anchor_columns[:, block]
        context = draft.project_context(tiny_batch.context_features)
        cache = draft.context_key_values(context, torch.arange(length)[None].expand(rows, -1))
        for keys, values in cache:  # beyond the anchor a decoder's cache holds leftovers
            stale = torch.arange(length)[None] >= anchors[:, None]
            keys.masked_fill_(stale[:, None, :, None], 7.0), values.masked_fill_(stale[:, None, :, None], -9.0)
        tokens = tiny_batch.input_ids.gather(1, anchors[:, None])[:, 0]
        decoded = draft.draft_block(tokens, anchors, cache)
        assert decoded.shape == (rows, draft.block_size, 32)
        torch.testing.assert_close(decoded, trained[:, block], rtol=1e-5, atol=1e-5)


def test_context_projected_piece_by_piece_is_the_same(tiny_draft: MakeDraft, tiny_batch: TinyBatch) -> None:
    draft = tiny_draft()
    features, positions = tiny_batch.context_features, torch.arange(24)[None].expand(3, -1)
    whole = draft.context_key_values(draft.project_context(features), positions)
    tail = draft.context_key_values(draft.project_context(features[:, 10:]), positions[:, 10:])
    for (keys, values), (tail_keys, tail_values) in zip(whole, tail, strict=True):
        torch.testing.assert_close(keys[:, :, 10:], tail_keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values[:, :, 10:], tail_values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_block_sees_nothing_from_its_anchor_on(tiny_draft: MakeDraft, tiny_batch: TinyBatch, family: str) -> None:
    draft = tiny_draft(family)
    before = run(draft, tiny_batch)
    anchor = int(tiny_batch.anchor_columns[0, 2])
    ids, features = tiny_batch.input_ids.clone(), tiny_batch.context_features.clone()
    ids[0, anchor + 1 :] = (ids[0, anchor + 1 :] + 1) % 60
    features[0, anchor:] += 1
    after = run(draft, replace(tiny_batch, input_ids=ids, context_features=features))
    assert torch.equal(before[0, :3], after[0, :3])
    assert not torch.allclose(before[0, 3], after[0, 3])


def test_a_block_sees_its_anchor_token_and_the_token_before(tiny_draft: MakeDraft, tiny_batch: TinyBatch) -> None:
    draft = tiny_draft()
    before = run(draft, tiny_batch)
    anchor = int(tiny_batch.anchor_columns[0, 2])
    ids, features = tiny_batch.input_ids.clone(), tiny_batch.context_features.clone()
    ids[0, anchor] = (ids[0, anchor] + 1) % 60
    features[0, anchor - 1] += 1
    changed_token = run(draft, replace(tiny_batch, input_ids=ids))[0, 2]
    changed_context = run(draft, replace(tiny_batch, context_features=features))[0, 2]
    for slot in range(draft.block_size):  # bidirectional: every slot reads the anchor
        assert not torch.allclose(before[0, 2, slot], changed_token[slot], atol=1e-4)
        assert not torch.allclose(before[0, 2, slot], changed_context[slot], atol=1e-4)


def test_blocks_do_not_see_each_other(tiny_draft: MakeDraft, tiny_batch: TinyBatch) -> None:
    draft = tiny_draft()
    before = run(draft, tiny_batch)
    moved = tiny_batch.anchor_columns.clone()
    moved[:, 1] = 6
    after = run(draft, replace(tiny_batch, anchor_columns=moved))
    others = [0, 2, 3]
    torch.testing.assert_close(after[:, others], before[:, others], rtol=1e-6, atol=1e-6)
    alone = run(
        draft,
        replace(tiny_batch, anchor_columns=moved[:, 2:3], block_mask=tiny_batch.block_mask[:, 2:3]),
    )
    torch.testing.assert_close(alone[:2, 0], before[:2, 2], rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing_and_stays_finite(tiny_draft: MakeDraft, tiny_batch: TinyBatch) -> None:
    draft = tiny_draft()
    padded = run(draft, tiny_batch)
    assert padded.isfinite().all()
    row = tiny_batch.rows([2])
    unpadded = TinyBatch(
        **{
            name: value[:, :15] if name not in ("anchor_columns", "block_mask") else value[:, :2]
            for name, value in vars(row).items()
        }
    )
    torch.testing.assert_close(run(draft, unpadded)[0], padded[2, :2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_equal_single_ones(tiny_draft: MakeDraft, tiny_batch: TinyBatch, variant: dict) -> None:
    draft = tiny_draft(**variant)
    alone = run(draft, tiny_batch)
    together = run(draft, tiny_batch.packed((2, 0, 1)))[0]
    torch.testing.assert_close(together[:2], alone[2, :2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[2:6], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[6:], alone[1], rtol=1e-5, atol=1e-5)


def test_the_window_hides_far_context(tiny_draft: MakeDraft, tiny_batch: TinyBatch) -> None:
    draft = tiny_draft(sliding_window=4)
    before = run(draft, tiny_batch)
    features = tiny_batch.context_features.clone()
    features[0, 12 - 5] += 1  # five before the anchor at 12
    assert torch.equal(run(draft, replace(tiny_batch, context_features=features))[0, 2], before[0, 2])
    features[0, 12 - 4] += 1
    assert not torch.allclose(run(draft, replace(tiny_batch, context_features=features))[0, 2], before[0, 2])


def test_llama_layers_have_the_biases_the_target_has_and_no_head_norms(tiny_draft: MakeDraft) -> None:
    plain = tiny_draft("llama").state_dict()
    layers = [name for name in plain if name.startswith("layers.")]
    assert not [name for name in layers if "q_norm" in name or "k_norm" in name or name.endswith("bias")]
    biased = tiny_draft("llama", target_changes={"attention_bias": True, "mlp_bias": True}).state_dict()
    added = {name.removeprefix("layers.0.") for name in biased.keys() - plain.keys() if name.startswith("layers.0.")}
    attention = {f"self_attn.{name}_proj.bias" for name in "qkvo"}
    assert added == attention | {f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")}


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_draft_can_start_as_the_end_of_its_target(family: str) -> None:
    torch.manual_seed(0)
    config = tiny_target_config(family)
    target = Target(AutoModelForCausalLM.from_config(config), "tiny")
    draft = build_draft(tiny_draft_config(config), target)
    before = draft.fc.weight.clone()
    draft.start_from_target(target)
    for mine, theirs in zip(draft.layers, target.decoder_layers[-len(draft.layers) :], strict=True):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(draft.norm.weight, target.final_norm.weight)
    added = draft.fc.weight - before
    torch.testing.assert_close(added[:, -config.hidden_size :], torch.eye(config.hidden_size))
    assert not added[:, : -config.hidden_size].any()
    deep = build_draft(tiny_draft_config(config, num_layers=config.num_hidden_layers + 1), target)
    with pytest.raises(ConfigError, match=f"draft.num_layers={config.num_hidden_layers + 1}: .* at most the target's"):
        deep.start_from_target(target)

"""What a block may see, and that decoding sees the same as training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TinyBatch, tiny_draft_config, tiny_target_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from deepspec.config import ConfigError
from deepspec.drafts import DSparkModel, build_draft
from deepspec.kernels.attention import ContextSpans

MakeDraft = Callable[..., DSparkModel]
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
VARIANTS = [
    {},
    {"family": "llama"},
    {"family": "llama", "target_changes": {"attention_bias": True, "mlp_bias": True}},
    {"family": "gemma4"},
    {"family": "gemma4", "target_changes": {"attention_k_eq_v": False}},
    {"embedding_scale": 5.0},
    {"num_heads": 3, "num_kv_heads": 1, "head_dim": 12, "intermediate_size": 20},
    {"sliding_window": 4},
    {"block_size": 1},
    {"sample_from_anchor": False},
    {"algorithm": "dflash", "markov_rank": 0, "confidence_head": False, "sample_from_anchor": False, "block_size": 2},
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
        assert decoded.shape == (rows, draft.draft_length, 32)
        torch.testing.assert_close(decoded, trained[:, block], rtol=1e-5, atol=1e-5)


def test_context_projected_piece_by_piece_is_the_same(tiny_draft: MakeDraft, tiny_batch: TinyBatch) -> None:
    draft = tiny_draft()
    features, positions = tiny_batch.context_features, torch.arange(24)[None].expand(3, -1)
    whole = draft.context_key_values(draft.project_context(features), positions)
    tail = draft.context_key_values(draft.project_context(features[:, 10:]), positions[:, 10:])
    for (keys, values), (tail_keys, tail_values) in zip(whole, tail, strict=True):
        torch.testing.assert_close(keys[:, :, 10:], tail_keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values[:, :, 10:], tail_values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma4", "llama"])
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


def test_the_embedding_is_scaled(tiny_draft: MakeDraft, tiny_batch: TinyBatch) -> None:
    scaled, plain = tiny_draft(embedding_scale=5.0), tiny_draft()
    assert not torch.allclose(run(scaled, tiny_batch), run(plain, tiny_batch))
    plain.embed_tokens.weight.mul_(5)
    torch.testing.assert_close(run(scaled, tiny_batch), run(plain, tiny_batch))


def full_attention_gemma() -> PreTrainedConfig:
    return tiny_target_config("gemma4", layer_types=["full_attention"] * 6)


class RandomTarget:
    """What a draft takes from its target, of any family."""

    def __init__(self, config: PreTrainedConfig):
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(config)
        self.embedding_weight = self.model.get_input_embeddings().weight
        self.head_weight = self.model.get_output_embeddings().weight
        self.decoder_layers = self.model.model.layers
        self.final_norm = self.model.model.norm


@pytest.mark.parametrize("family", ["qwen3", "gemma4"])
def test_a_draft_can_start_as_the_end_of_its_target(family: str) -> None:
    config = full_attention_gemma() if family == "gemma4" else tiny_target_config()
    architecture = {"qwen3": "Qwen3DSparkModel", "gemma4": "Gemma4DSparkModel"}[family]
    target = RandomTarget(config)
    draft = build_draft(tiny_draft_config(config, architecture=architecture), target)
    before = draft.fc.weight.clone()
    draft.start_from_target(target)
    for mine, theirs in zip(draft.layers, target.decoder_layers[-len(draft.layers) :], strict=True):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(draft.norm.weight, target.final_norm.weight)
    added = draft.fc.weight - before
    torch.testing.assert_close(added[:, -config.hidden_size :], torch.eye(config.hidden_size))
    assert not added[:, : -config.hidden_size].any()
    layers = config.num_hidden_layers + 1
    deep = build_draft(tiny_draft_config(config, architecture=architecture, num_layers=layers), target)
    with pytest.raises(ConfigError, match=f"draft.num_layers={layers}: .* at most the target's"):
        deep.start_from_target(target)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            tiny_target_config("llama"),
            {},
            r"layer 4 of the target, a LlamaDecoderLayer, lacks self_attn.k_norm.weight, self_attn.q_norm.weight of",
        ),
        (
            Qwen2Config(**SIZES, num_hidden_layers=6),
            {},
            r"layer 4 of the target, a Qwen2DecoderLayer, lacks self_attn.k_norm.weight, self_attn.q_norm.weight of",
        ),
        (
            tiny_target_config(attention_bias=True),
            {},
            r"a Qwen3DecoderLayer, has self_attn.k_proj.bias, .*, unlike a layer of Qwen3DSparkModel; set draft",
        ),
        (tiny_target_config(), {"intermediate_size": 20}, r"has mlp.gate_proj.weight \[48, 32\] instead of \[20, 32\]"),
    ],
)
def test_a_target_with_other_layers_is_no_start(
    config: PreTrainedConfig, changes: dict[str, Any], message: str
) -> None:
    target = RandomTarget(config)
    draft = build_draft(tiny_draft_config(config, **changes), target)
    before = {name: value.clone() for name, value in draft.state_dict().items()}
    with pytest.raises(ConfigError, match="draft.start_from_target=true: .*" + message):
        draft.start_from_target(target)
    assert all(torch.equal(value, before[name]) for name, value in draft.state_dict().items())


def gemma_pair(target_config: PreTrainedConfig, **changes: Any) -> tuple[RandomTarget, DSparkModel]:
    """A Gemma 4 target and a draft that starts as all of it. No norm and no scalar is one, so that none hides."""
    target = RandomTarget(target_config)
    with torch.no_grad():
        for parameter in target.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        for name, buffer in target.model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.7)
    config = tiny_draft_config(target_config, architecture="Gemma4DSparkModel", num_layers=6, **changes)
    draft = build_draft(config, target)
    draft.start_from_target(target)
    return target, draft


@pytest.mark.parametrize("keys_are_values", [True, False])
@torch.no_grad()
def test_gemma_layers_compute_what_the_targets_do(keys_are_values: bool) -> None:
    config = tiny_target_config("gemma4", layer_types=["full_attention"] * 6, attention_k_eq_v=keys_are_values)
    target, draft = gemma_pair(config, block_size=5)
    hidden, positions = torch.randn(1, 5, 32), torch.arange(11, 16)[None]
    rotation = target.model.model.rotary_emb(hidden, positions, "full_attention")
    theirs = target.decoder_layers[2](
        hidden.clone(), position_embeddings=rotation, attention_mask=torch.zeros(1, 1, 5, 5), shared_kv_states={}
    )
    nothing = torch.zeros(1, 1).long()
    context = draft.context_key_values(torch.zeros(1, 1, 32), nothing)[2]
    rotation = draft.rotary_emb(hidden, positions)
    ours = draft.layers[2](hidden[:, None], rotation, context, ContextSpans(nothing, nothing))
    torch.testing.assert_close(ours[:, 0], theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_gemma_embedding_and_head_are_those_of_the_target() -> None:
    """A block of one slot with an empty context attends itself alone, as the first token of a text does."""
    target, draft = gemma_pair(full_attention_gemma(), block_size=1)
    token, column = torch.tensor([[7]]), torch.zeros(1, 1).long()
    hidden = draft(token, column, torch.zeros(1, 1, 96), column, torch.tensor([[True]]))
    expected = target.model(token).logits[0, 0]
    torch.testing.assert_close(draft.base_logits(hidden)[0, 0, 0], expected, rtol=1e-4, atol=1e-4)

"""A draft for a target of every family: its sizes, its RoPE, and that it runs, is saved and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyBatch, tiny_draft_config
from transformers import AutoConfig, DeepseekV3Config, PreTrainedConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from deepspec.config import ConfigError
from deepspec.drafts import build_draft, load_draft
from deepspec.drafts.shapes import LayerShape, layer_shape, plain_rope

FAMILIES = [
    *("llama", "qwen2", "qwen3", "mistral", "ministral3", "smollm3", "phi3", "olmo2", "olmo3", "granite", "glm4"),
    *("gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "qwen3_moe", "mixtral", "glm4_moe", "qwen3_next"),
    *("qwen3_5_text", "lfm2", "deepseek_v3", "nemotron_h"),
]
WRAPPERS = ["gemma3", "gemma4", "qwen3_5", "mistral3"]
TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "phi3": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 128,
        }
    },
    "gemma4_text": {"head_dim": 8, "global_head_dim": 16, "vocab_size_per_layer_input": 61},
    "gpt_oss": {"head_dim": 8},
    "deepseek_v3": {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8},
    "nemotron_h": {"head_dim": 8, "layers_block_type": ["mamba", "moe", "attention"] * 2},
}


def tiny_settings(family: str) -> dict[str, Any]:
    settings = TINY | OF_FAMILY.get(family, {})
    if family == "nemotron_h":  # counts the entries of layers_block_type
        del settings["num_hidden_layers"]
    return settings


def tiny_config(family: str) -> PreTrainedConfig:
    if family not in WRAPPERS:
        return AutoConfig.for_model(family, **tiny_settings(family))
    text_type = type(AutoConfig.for_model(family).get_text_config()).model_type
    return AutoConfig.for_model(family, text_config={"model_type": text_type} | tiny_settings(text_type))


@pytest.mark.parametrize("family", FAMILIES + WRAPPERS)
def test_a_draft_of_every_family_runs_and_comes_back(family: str, tiny_batch: TinyBatch, tmp_path: Path) -> None:
    target = tiny_config(family)
    before = target.to_dict()
    config = tiny_draft_config(target)
    assert target.to_dict() == before
    assert type(config) is Qwen3Config
    assert config.architectures == ["Qwen3DSparkModel"]
    # Fields that a Qwen3 config does not have mean nothing in a draft, or something else to another reader.
    assert config.to_dict().keys() == tiny_draft_config().to_dict().keys()
    draft = build_draft(config)
    arguments = tiny_batch.for_backbone()
    with torch.no_grad():
        trained = draft(**arguments)
        context = draft.project_context(tiny_batch.context_features)
        anchors = tiny_batch.anchor_columns[:, 0]
        tokens = tiny_batch.input_ids.gather(1, anchors[:, None])[:, 0]
        decoded = draft.draft_block(tokens, anchors, draft.context_key_values(context, tiny_batch.position_ids))
    torch.testing.assert_close(decoded, trained[:, 0], rtol=1e-5, atol=1e-5)
    draft.save_pretrained(tmp_path)
    assert torch.equal(load_draft(tmp_path)(**arguments), trained)


@pytest.mark.parametrize("family", FAMILIES + WRAPPERS)
def test_the_defaults_of_every_family_give_a_sensible_shape(family: str) -> None:
    target = AutoConfig.for_model(family)
    config = tiny_draft_config(target, num_layers=1, target_layer_ids=None)
    text = target.get_text_config()
    assert (config.vocab_size, config.hidden_size) == (text.vocab_size, text.hidden_size)
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.num_attention_heads * config.head_dim >= config.hidden_size / 2
    assert config.head_dim in (64, 80, 96, 128, 256)
    assert 2 <= config.intermediate_size / config.hidden_size <= 7
    with torch.device("meta"):
        build_draft(config)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("deepseek_v3", {}, LayerShape(56, 8, 128, 18432)),
        ("gpt_oss", {}, LayerShape(64, 8, 64, 3 * 2880)),
        ("qwen3_5_moe_text", {}, LayerShape(16, 2, 256, 3 * 2048)),
        ("gemma3n_text", {}, LayerShape(8, 2, 256, 3 * 2048)),
        ("mamba2", {}, LayerShape(32, 32, 128, 3 * 4096)),
        ("qwen3", {"num_attention_heads": 12, "num_key_value_heads": 5}, LayerShape(12, 4, 128, 22016)),
        ("gpt2", {"n_embd": 99, "n_head": 3}, LayerShape(3, 3, 32, 297)),
        ("gemma4_text", {}, LayerShape(8, 4, 256, 9216)),
    ],
)
def test_what_does_not_fit_is_chosen(family: str, changes: dict[str, Any], expected: LayerShape) -> None:
    assert layer_shape(AutoConfig.for_model(family, **changes)) == expected


def test_given_sizes_win() -> None:
    target = DeepseekV3Config()
    assert layer_shape(target, head_dim=64, intermediate_size=99) == LayerShape(112, 8, 64, 99)
    assert layer_shape(target, num_heads=6, head_dim=64).num_kv_heads == 6
    assert layer_shape(Qwen3Config(), num_heads=20).num_kv_heads == 20
    assert layer_shape(Qwen3Config(num_key_value_heads=8), num_heads=20) == LayerShape(20, 5, 128, 22016)
    with pytest.raises(ConfigError, match=r"draft.num_kv_heads=3: must divide the number of heads, which is 32"):
        layer_shape(Qwen3Config(), num_kv_heads=3)


YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
            {"rope_type": "default", "rope_theta": 5e5},
        ),
        (
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
        ),
        (YARN | {"beta_fast": None, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.5}, YARN),
        (YARN | {"truncate": False, "mscale": 1.0}, YARN | {"truncate": False, "mscale": 1.0}),
        (YARN | {"factor": None}, YARN),
        (
            {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0},
            {"rope_type": "default", "rope_theta": 5e5},
        ),
        (
            {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
            {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        ),
        (
            {"full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}},
            {"rope_type": "default", "rope_theta": 1e6},
        ),
        (None, {"rope_type": "default", "rope_theta": 1e4}),
    ],
)
def test_rope_is_the_targets_where_it_is_plain(rope: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    target = Qwen3Config(max_position_embeddings=256)
    target.rope_parameters = rope
    assert plain_rope(target) == expected


def test_llama_3_rope_turns_as_the_targets() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    target = AutoConfig.for_model("llama", **TINY, rope_parameters=rope)
    draft = build_draft(tiny_draft_config(target))
    positions = torch.arange(200)[None]
    ours, theirs = (rotary(torch.zeros(1), positions) for rotary in (draft.rotary_emb, LlamaRotaryEmbedding(target)))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])

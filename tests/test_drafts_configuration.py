"""Draft configs: defaults, what leaks from the target, and every value that cannot work."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import old_llama_config, tiny_draft_config, tiny_target_config
from transformers import NemotronHConfig, PreTrainedConfig, Qwen3Config, Qwen3NextConfig, ViTConfig

from deepspec.config import ConfigError
from deepspec.drafts import DraftSettings, build_draft, default_layer_ids, engine_limits


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (36, [1, 9, 17, 25, 33]),
        (40, [1, 10, 19, 28, 37]),
        (6, [1, 2, 3]),
        (4, [1]),
        (2, [0]),
        (1, [-1]),
    ],
)
def test_default_layers_are_the_published_ones(depth: int, expected: list[int]) -> None:
    assert default_layer_ids(depth) == expected
    assert (
        tiny_draft_config(tiny_target_config(num_hidden_layers=depth), target_layer_ids=None).target_layer_ids
        == expected
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_layer_ids": [1, 9]}, r"draft.target_layer_ids=\[1, 9\]: out of range; .* -1 .* to 4"),
        ({"target_layer_ids": [-2, 1]}, r"draft.target_layer_ids=\[-2, 1\]: out of range; .* -1 .* to 4"),
        ({"target_layer_ids": [1, 5]}, r"draft.target_layer_ids=\[1, 5\]: 5 is the final layer.* to 4"),
        ({"target_layer_ids": [3, 1]}, r"draft.target_layer_ids=\[3, 1\]: not strictly increasing"),
        ({"target_layer_ids": [1, 1]}, r"draft.target_layer_ids=\[1, 1\]: not strictly increasing"),
        ({"target_layer_ids": []}, r"draft.target_layer_ids=\[\]: name at least one layer"),
        ({"block_size": 0}, "draft.block_size=0: must be at least 1"),
        (
            {"block_size": 1, "sample_from_anchor": False},
            "draft.block_size=1: must be at least 2 with draft.sample_from_anchor=false",
        ),
        ({"num_layers": 0}, "draft.num_layers=0: must be at least 1"),
        ({"num_anchors": 0}, "train.num_anchors=0: must be at least 1"),
        ({"sliding_window": 0}, "draft.sliding_window=0: must be at least 1"),
        ({"num_heads": 0}, "draft.num_heads=0: must be at least 1"),
        ({"num_heads": 4, "num_kv_heads": 3}, "draft.num_kv_heads=3: must divide the number of heads, which is 4"),
        ({"head_dim": 7}, "draft.head_dim=7: must be even"),
        ({"intermediate_size": 0}, "draft.intermediate_size=0: must be at least 1"),
        (
            {"architecture": "Qwen3DSpark"},
            "draft.architecture=Qwen3DSpark: must be one of Qwen3DSparkModel, Gemma4DSparkModel.*'Qwen3DSparkModel'",
        ),
        ({"architecture": "Gemma4DSparkModel"}, "only for Gemma 4 targets, and this is qwen3; set Qwen3DSparkModel"),
        ({"mask_token_id": 61}, "draft.mask_token_id=61: must be a token of the target, 0 to 60"),
        ({"mask_token_id": -1}, "draft.mask_token_id=-1"),
        ({"mask_token_id": None}, "draft.mask_token_id=None"),
        ({"markov_rank": 33}, "draft.markov_rank=33: must be at most the target's hidden size 32"),
        ({"markov_rank": -1}, "draft.markov_rank=-1: must be at least 0"),
        ({"markov_head_type": "gatd"}, "draft.markov_head_type=gatd: must be one of vanilla, gated, rnn.*'gated'"),
        ({"algorithm": "dsprk"}, "draft.algorithm=dsprk: must be one of dspark, dflash.*'dspark'"),
        ({"markov_rank": 0}, "draft.confidence_head_with_markov=true: needs draft.markov_rank above 0"),
        ({"algorithm": "dflash"}, "draft.algorithm=dflash has no heads, but draft.markov_rank=8"),
    ],
)
def test_impossible_values_name_key_value_and_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_draft_config(**changes)


def test_impossible_targets() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size is missing in the target's config \(model_type vit\)"):
        tiny_draft_config(ViTConfig())


def test_gemma_drafts_take_gemma_settings_only() -> None:
    target = tiny_target_config("gemma4")
    with pytest.raises(ConfigError, match=r"draft.sample_from_anchor=false: no engine has it for Gemma4DSparkModel"):
        tiny_draft_config(target, architecture="Gemma4DSparkModel", sample_from_anchor=False)
    with pytest.raises(ConfigError, match=r"draft.sliding_window=9: Gemma4DSparkModel has full attention only"):
        tiny_draft_config(target, architecture="Gemma4DSparkModel", sliding_window=9)
    with pytest.raises(ConfigError, match=r"its embedding is scaled by sqrt\(hidden size\), that of the target by 3"):
        tiny_draft_config(target, architecture="Gemma4DSparkModel", embedding_scale=3.0)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Qwen3NextConfig(num_hidden_layers=48), [1, 12, 23, 34, 45]),
        (NemotronHConfig(layers_block_type=["mamba", "moe"] * 24 + ["attention", "mlp"] * 2), [1, 13, 25, 37, 49]),
    ],
)
def test_hybrids_are_captured_evenly_too(target: PreTrainedConfig, expected: list[int]) -> None:
    assert tiny_draft_config(target, target_layer_ids=None).target_layer_ids == expected


def test_the_target_does_not_leak() -> None:
    target = tiny_target_config(
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=2,
        quantization_config={"bits": 4},
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
    )
    assert "sliding_attention" in target.layer_types
    before = target.to_dict()
    config = tiny_draft_config(target)
    assert type(config) is Qwen3Config
    assert config.architectures == ["Qwen3DSparkModel"]
    assert (config.num_hidden_layers, config.num_target_layers) == (2, 6)
    assert config.layer_types == ["full_attention"] * 2
    assert (config.use_sliding_window, config.sliding_window, config.attention_bias) == (False, None, False)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert not hasattr(config, "quantization_config")
    assert config.tie_word_embeddings is False
    assert config.sample_from_anchor is True
    assert target.to_dict() == before


def test_a_window_is_written_as_engines_read_it() -> None:
    config = tiny_draft_config(sliding_window=9)
    assert config.layer_types == ["sliding_attention"] * 2
    assert (config.use_sliding_window, config.sliding_window, config.is_causal) == (True, 9, False)
    assert config.dflash_config == {"causal": False}
    assert DraftSettings.of(config).context_window == 9
    assert DraftSettings.of(tiny_draft_config()).context_window is None
    config.is_causal = None
    assert DraftSettings.of(config).context_window == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_causal": True}, "the slots of this draft do not see those behind them"),
        ({"is_causal": None, "dflash_config": {}}, "the slots of this draft do not see those behind them"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "all layers of a draft must be full_attention, or"),
        ({"dflash_config": {"causal": False, "use_swa": True}}, "use_swa=True: DeepSpec has no such draft"),
        ({"sample_from_anchor": False, "block_size": 1}, "must be at least 2 with draft.sample_from_anchor=false"),
    ],
)
def test_drafts_of_another_kind_are_refused(changes: dict[str, Any], message: str) -> None:
    config = tiny_draft_config(sliding_window=9)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=message):
        DraftSettings.of(config)


def test_fields_follow_the_heads_and_the_target() -> None:
    plain = tiny_draft_config(algorithm="dflash", markov_rank=0, confidence_head=False).to_dict()
    assert plain["draft_algorithm"] == "dflash"
    fields = {"embedding_scale", "logit_scale", "final_logit_softcapping", "is_causal", "dflash_config"}
    assert not ({"markov_head_type", "confidence_head_with_markov"} | fields) & plain.keys()
    settings = DraftSettings.of(tiny_draft_config())
    assert (settings.embedding_scale, settings.logit_scale, settings.logit_softcap) == (1, 1, None)
    scaled = tiny_draft_config(embedding_scale=6.0, logit_scale=0.25, final_logit_softcapping=30.0)
    assert (scaled.embedding_scale, scaled.logit_scale, scaled.final_logit_softcapping) == (6, 0.25, 30)
    settings = DraftSettings.of(scaled)
    assert (settings.embedding_scale, settings.logit_scale, settings.logit_softcap) == (6, 0.25, 30)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"sliding_window": 9}, []),
        ({"embedding_scale": 6.0}, [r"vLLM and SGLang do not scale its embedding \(embedding_scale=6\)"]),
        (
            {"logit_scale": 0.25, "final_logit_softcapping": 30.0},
            [r"do not cap its logits \(final_logit_softcapping=30\)", r"SGLang does not scale its logits"],
        ),
        ({"markov_head_type": "rnn"}, [r"vLLM has only the vanilla sequential head \(markov_head_type=rnn\)"]),
        ({"algorithm": "dflash", "markov_rank": 0, "confidence_head": False}, ["without a sequential head"]),
        ({"algorithm": "dflash", "markov_rank": 0, "confidence_head": False, "sample_from_anchor": False}, []),
    ],
)
def test_what_engines_cannot_do_is_said(changes: dict[str, Any], expected: list[str]) -> None:
    limits = engine_limits(tiny_draft_config(**changes))
    assert len(limits) == len(expected)
    for limit, pattern in zip(limits, expected, strict=True):
        assert re.search(pattern, limit)


def test_what_engines_cannot_do_with_other_architectures() -> None:
    assert engine_limits(old_llama_config({})) == ["no engine has LlamaDSparkModel"]
    gemma = tiny_draft_config(tiny_target_config("gemma4"), architecture="Gemma4DSparkModel")
    assert [limit.split()[0] for limit in engine_limits(gemma)] == ["SGLang", "vLLM"]


def test_configs_without_our_fields_say_which_algorithm() -> None:
    for changes, expected in (({}, "dspark"), ({"markov_rank": 0, "confidence_head": False}, "dflash")):
        config = tiny_draft_config(**changes)
        del config.draft_algorithm
        assert DraftSettings.of(config).algorithm == expected
    with pytest.raises(ConfigError, match="block_size, mask_token_id, target_layer_ids missing"):
        DraftSettings.of(tiny_target_config())


def test_the_same_seed_gives_the_same_draft_and_leaves_the_global_stream_alone() -> None:
    config = tiny_draft_config()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second, other = build_draft(config, seed=1), build_draft(config, seed=1), build_draft(config, seed=2)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_a_fresh_draft_is_its_backbone_alone() -> None:
    head = build_draft(tiny_draft_config(markov_head_type="rnn")).markov_head
    assert head is not None
    assert not head.markov_w2.weight.any()
    assert head.markov_w1.weight.std().item() == pytest.approx(1, abs=0.1)

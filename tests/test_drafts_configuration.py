"""Draft configs: defaults, what leaks from the target, and every value that cannot work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_draft_config, tiny_target_config
from transformers import GPT2Config, Qwen3Config

from deepspec.config import ConfigError
from deepspec.drafts import DraftSettings, build_draft, default_layer_ids


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
        ({"num_layers": 0}, "draft.num_layers=0: must be at least 1"),
        ({"num_anchors": 0}, "train.num_anchors=0: must be at least 1"),
        ({"sliding_window": 0}, "draft.sliding_window=0: must be at least 1"),
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
    with pytest.raises(ConfigError, match=r"num_attention_heads=4 of the target: must be a multiple of .*=3"):
        tiny_draft_config(tiny_target_config(num_key_value_heads=3))
    with pytest.raises(
        ConfigError, match="model_type=gpt2: no draft layers for this family; supported are qwen3, llama"
    ):
        tiny_draft_config(GPT2Config())


def test_the_target_does_not_leak() -> None:
    target = tiny_target_config(
        use_sliding_window=True, sliding_window=16, max_window_layers=2, quantization_config={"bits": 4}
    )
    assert "sliding_attention" in target.layer_types
    before = target.to_dict()
    config = tiny_draft_config(target, sliding_window=9)
    assert isinstance(config, Qwen3Config)
    assert (config.num_hidden_layers, config.num_target_layers) == (2, 6)
    assert config.layer_types == ["full_attention"] * 2
    assert (config.use_sliding_window, config.sliding_window) == (False, None)
    assert DraftSettings.of(config).context_window == 9
    assert not hasattr(config, "quantization_config")
    assert config.tie_word_embeddings is False
    assert target.to_dict() == before


def test_fields_follow_the_heads() -> None:
    plain = tiny_draft_config(algorithm="dflash", markov_rank=0, confidence_head=False).to_dict()
    assert plain["draft_algorithm"] == "dflash"
    assert not {"markov_head_type", "confidence_head_with_markov", "draft_context_window"} & plain.keys()
    assert "draft_context_window" not in tiny_draft_config().to_dict()


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

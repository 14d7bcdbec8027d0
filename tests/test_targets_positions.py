"""How long a text a target can read."""

from __future__ import annotations

import sys

import pytest
from transformers import GptOssConfig, LlamaConfig, Phi3Config, PreTrainedConfig, Qwen3Config

from deepspec.config import ConfigError
from deepspec.targets import position_range
from deepspec.targets.positions import check_positions

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("written", "rope", "expected"),
    [
        (512, None, 512),
        (512, YARN, 2048),  # switched on by its parameters alone
        (640, YARN, 2048),  # Qwen3: 40960 are written, 32768 times 4 are meant
        (2048, YARN, 2048),
        (4096, YARN, 4096),
        (1024, LLAMA3, 1024),
        (4096, LLAMA3, 4096),
        (512, LINEAR, 512),
    ],
)
def test_range(written, rope, expected):
    config = Qwen3Config if rope is YARN or rope is None else LlamaConfig
    assert position_range(config(max_position_embeddings=written, rope_parameters=rope)) == expected


def test_a_number_that_is_not_written_twice_counts_as_the_original_one():
    rope = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}
    assert position_range(Qwen3Config(max_position_embeddings=512, rope_parameters=rope)) == 2048


def test_parameters_for_each_type_of_layer():
    rope = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = Qwen3Config(max_position_embeddings=512, layer_types=["full_attention", "sliding_attention"] * 16)
    config.rope_parameters = rope
    assert position_range(config) == 2048


def test_configs_as_published():
    assert position_range(GptOssConfig()) == 131072


def test_no_limit_is_written():
    assert position_range(PreTrainedConfig()) == sys.maxsize


def phi() -> Phi3Config:
    """128k positions by longrope, 64 of them with the short factors."""
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
    parameters = factors | {"original_max_position_embeddings": 64}
    return Phi3Config(
        max_position_embeddings=131072, original_max_position_embeddings=64, rope_parameters=parameters, **sizes
    )


def test_a_rope_that_changes_with_the_length_of_the_row_is_kept_within_its_first_part():
    dynamic = LlamaConfig(max_position_embeddings=48, rope_parameters={"rope_type": "dynamic", "factor": 4.0})
    for config, limit in ((phi(), 64), (dynamic, 48)):
        assert position_range(config) == limit
        check_positions(config, limit, "data.max_length")
        with pytest.raises(ConfigError, match=rf"data.max_length={limit + 1}: .* set at most data.max_length={limit}"):
            check_positions(config, limit + 1, "data.max_length")
    check_positions(LlamaConfig(max_position_embeddings=48), 1000, "data.max_length")

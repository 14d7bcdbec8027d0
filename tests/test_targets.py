"""Target adapters, feature capture, fingerprints."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from deepspec.features import OnlineFeatures, build_feature_source
from deepspec.targets import Target, load_target, load_target_config

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def tiny_model(family: str, seed: int = 0):
    torch.manual_seed(seed)
    config_class, model_class = FAMILIES[family]
    return model_class(config_class(**SIZES))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_hidden_states_of_transformers(family):
    target = Target(tiny_model(family), "tiny")
    ids = torch.randint(0, 64, (2, 9))
    mask = torch.ones_like(ids)
    reference = target.model(ids, attention_mask=mask, output_hidden_states=True)
    features = target.features(ids, mask, [-1, 0, 3])
    expected = torch.cat([reference.hidden_states[i + 1] for i in (-1, 0, 3)], dim=-1)
    torch.testing.assert_close(features.context, expected)
    torch.testing.assert_close(features.final, reference.hidden_states[-1])
    torch.testing.assert_close(target.logits(features.final), reference.logits)


def test_padding_does_not_change_features():
    target = Target(tiny_model("qwen3"), "tiny")
    ids = torch.randint(0, 64, (1, 7))
    alone = target.features(ids, torch.ones_like(ids), [1, 2])
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 7 + [0] * 4])
    together = target.features(padded, mask, [1, 2])
    torch.testing.assert_close(together.context[:, :7], alone.context)
    torch.testing.assert_close(together.final[:, :7], alone.final)


def test_hooks_are_removed_and_nothing_asks_for_gradients():
    target = Target(tiny_model("llama"), "tiny")
    ids = torch.randint(0, 64, (1, 4))
    features = target.features(ids, torch.ones_like(ids), [-1, 2])
    assert not features.context.requires_grad
    assert not any(parameter.requires_grad for parameter in target.model.parameters())
    assert not target.model.training
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in target.model.model.layers)


def test_fingerprint_knows_the_weights_but_not_the_dtype(tmp_path):
    model = tiny_model("qwen3")
    original = Target(model, "tiny").fingerprint
    model.save_pretrained(tmp_path)
    assert load_target(str(tmp_path)).fingerprint == original
    assert load_target(str(tmp_path), dtype=torch.bfloat16).fingerprint == original
    assert Target(tiny_model("qwen3", seed=1), "other").fingerprint != original
    changed = tiny_model("qwen3")
    changed.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    assert Target(changed, "changed").fingerprint != original


def test_online_source_gives_the_target_features():
    target = Target(tiny_model("qwen3"), "tiny")
    source = build_feature_source("online", target, [0, 2])
    assert isinstance(source, OnlineFeatures)
    ids = torch.randint(0, 64, (2, 5))
    mask = torch.ones_like(ids)
    torch.testing.assert_close(source.batch_features(ids, mask).context, target.features(ids, mask, [0, 2]).context)


def test_unsupported_family_is_named(tmp_path):
    GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type 'gpt2' is not supported; supported are llama, qwen3"):
        load_target(str(tmp_path))


def test_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_target_config(str(tmp_path))

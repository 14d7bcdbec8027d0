"""Target adapters, feature capture, fingerprints."""

from __future__ import annotations

import pytest
import torch
from conftest import token_batch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from deepspec.config import ConfigError
from deepspec.data.packing import Sample, lay_out
from deepspec.decoding import check_decodable
from deepspec.features import OnlineFeatures
from deepspec.targets import Target, load_target, load_target_config
from deepspec.targets.probe import probe_family

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


def tiny_model(family: str, seed: int = 0, window: int | None = None):
    torch.manual_seed(seed)
    config_class, model_class = FAMILIES[family]
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1} if window else {}
    return model_class(config_class(**SIZES, **sliding))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_hidden_states_of_transformers(family):
    target = Target(tiny_model(family), "tiny")
    ids = torch.randint(0, 64, (2, 9))
    reference = target.model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    features = target.features(token_batch(ids), [-1, 0, 3])
    expected = torch.cat([reference.hidden_states[i + 1] for i in (-1, 0, 3)], dim=-1)
    torch.testing.assert_close(features.context, expected)
    torch.testing.assert_close(features.final, reference.hidden_states[-1])
    torch.testing.assert_close(target.logits(features.final), reference.logits)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_packing_do_not_change_features(family, window):
    if family == "llama" and window:
        pytest.skip("Llama has no sliding window")
    target = Target(tiny_model(family, window=window), "tiny")
    samples = [
        Sample(i, 0, str(i), torch.randint(0, 64, (length,)).tolist(), [1] * length)
        for i, length in enumerate((7, 3, 12))
    ]
    alone = [target.features(lay_out([[sample]], 0), [-1, 1, 2]) for sample in samples]
    padded = target.features(lay_out([[sample] for sample in samples], 0), [-1, 1, 2])
    mixed_batch = lay_out([samples[::-1], samples[:1]], 0)
    mixed = target.features(mixed_batch, [-1, 1, 2])
    for name in ("context", "final"):
        for row, features in enumerate(alone):
            expected = getattr(features, name)[0]
            torch.testing.assert_close(getattr(padded, name)[row, : len(expected)], expected, rtol=1e-5, atol=1e-5)
        for document in mixed_batch.documents:
            found = getattr(mixed, name)[document.row, document.columns]
            expected = getattr(alone[document.index], name)[0]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert getattr(mixed, name).isfinite().all()


def test_a_sliding_window_is_that_of_transformers():
    model = tiny_model("qwen3", window=4)
    ids = torch.randint(0, 64, (2, 9))
    reference = model(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(Target(model, "tiny").features(token_batch(ids), []).final, reference)


def test_hooks_are_removed_and_nothing_asks_for_gradients():
    target = Target(tiny_model("llama"), "tiny")
    ids = torch.randint(0, 64, (1, 4))
    features = target.features(token_batch(ids), [-1, 2])
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
    source = OnlineFeatures(target, [0, 2])
    batch = token_batch(torch.randint(0, 64, (2, 5)))
    torch.testing.assert_close(source.batch_features(batch).context, target.features(batch, [0, 2]).context)


def test_an_unknown_family_that_the_adapter_understands_works_with_a_note(caplog):
    torch.manual_seed(0)
    config = StableLmConfig(**SIZES | {"use_qkv_bias": True})
    with caplog.at_level("WARNING"):
        target = Target(StableLmForCausalLM(config), "tiny")
        probe_family(target)
    assert "model type 'stablelm' is not among the tested families" in caplog.text
    assert target.features(token_batch(torch.ones(1, 3, dtype=torch.long)), [0]).context.shape == (1, 3, 32)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            RwkvForCausalLM(RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
            "has none of layers, h: write",
        ),
        # Its window is in the mask that its attention gets, and nowhere else.
        (PhimoeForCausalLM(PhimoeConfig(**SIZES | {"sliding_window": 6, "num_local_experts": 2})), "by a mask alone"),
        # Its attention adds a bias that ours would leave out.
        (BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)), "captured layers differ"),
    ],
)
def test_an_unknown_family_that_the_adapter_does_not_understand_is_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        probe_family(Target(model, "tiny"))


def test_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_target_config(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_in_half_precision_is_neither_blind_nor_too_strict(dtype):
    """A state that leaks from document to document differs by the size of the states, rounding by a few hundredths."""
    torch.manual_seed(0)
    known = StableLmForCausalLM(StableLmConfig(**SIZES | {"use_qkv_bias": True}))
    probe_family(Target(known.to(dtype), "tiny"))
    leaking = JambaForCausalLM(
        JambaConfig(
            **SIZES | {"num_experts": 1, "mamba_d_state": 4, "initializer_range": 0.3, "use_mamba_kernels": False}
        )
    )
    with pytest.raises(ConfigError, match="jamba"):
        refuse_what_does_not_fit(Target(leaking.to(dtype), "tiny"))


def refuse_what_does_not_fit(target: Target) -> None:
    probe_family(target)
    check_decodable(target)

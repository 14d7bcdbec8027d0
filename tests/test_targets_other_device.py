"""Passes of every kind of target on a device that is not the CPU and whose numbers nobody can read.

The meta device: a tensor left on the CPU, or a value that the host asks for, raises as it would stall a GPU.
"""

from __future__ import annotations

import pytest
import torch
from conftest import token_batch
from family_world import family_config
from transformers import AutoModelForCausalLM

from deepspec.decoding.cache import SlotCache
from deepspec.decoding.passes import target_pass
from deepspec.decoding.span import Span
from deepspec.targets import Target

META = torch.device("meta")
# Without routed experts: Transformers' eager ones ask the host which of them are hit.
KINDS = {
    "llama": {},
    "gemma2": {},
    "gemma3_text": {},
    "deepseek_v3": {"first_k_dense_replace": 4},
    "qwen3_5_text": {},
    "lfm2": {},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "mlp"]},
}


@pytest.mark.parametrize("family", KINDS)
def test_features_a_pass_and_a_replay_stay_on_their_device(family):
    with META:
        model = AutoModelForCausalLM.from_config(
            family_config(family, **KINDS[family]), attn_implementation="eager", dtype=torch.bfloat16
        )
    target = Target(model, family)
    features = target.features(token_batch(torch.zeros(2, 9, dtype=torch.long)).to(META), [0, 1])
    assert features.context.device == features.final.device == META
    cache = SlotCache(target, 3, 32, 4)
    cache.begin([0, 1])
    for count, is_certain in ((9, True), (3, False)):
        ids = torch.zeros(2 * count, dtype=torch.long, device=META)
        span = Span.of(range(2), [0, 0], [count] * 2, META)
        final = target_pass(target, None, cache, span, ids, is_certain=is_certain)
        assert target.logits(final).device == META
    cache.keep({0: 3, 1: 2}, 3)
    cache.move(1, 0, 4)

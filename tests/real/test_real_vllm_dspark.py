"""vLLM's class for DSpark drafts computes what ours does:
`python -m pytest -m real -s tests/real/test_real_vllm_dspark.py`.

vLLM's CPU build refuses to serve DSpark ("Model Runner V1 does not support: dspark"; the other runner needs Triton), so
`vllm.model_executor.models.qwen3_dspark` is built and called by itself, see drivers/vllm_dspark.py: folder, weights,
projected context, rotary positions, paged non-causal attention, heads and Markov bias are vLLM's. What cannot be run
without a GPU: its speculator, which prepares inputs and samples left to right in Triton kernels, and adaptive
verification, the only user of the confidence head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import environments
import pytest
import torch
from engines import drive
from safetensors.torch import load_file, save_file
from worlds import BUILTIN, EVERY_FIFTH, features_of_text, random_draft

from deepspec.targets import load_target

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"confidence_head_with_markov": False}, {"kept_tokens": EVERY_FIFTH}],
    ids=["whole", "plain", "pruned"],
)
def test_backbone_bias_and_confidence_are_ours(tmp_path: Path, changes: dict[str, Any]):
    target = load_target("builtin", dtype=torch.float32)
    draft = random_draft(target, **changes)
    draft.save_pretrained(tmp_path / "draft")
    ids, features = features_of_text(target, draft.target_layer_ids)
    positions = torch.tensor([40, 7, 1])
    rows = torch.arange(len(ids))
    anchors = ids[rows, positions]
    prev_tokens = ids[rows[:, None], positions[:, None] + torch.arange(draft.block_size)]
    given = {"context": features.context, "positions": positions, "anchors": anchors, "prev_tokens": prev_tokens}
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, tmp_path / "given.safetensors")

    answer = drive(
        environments.vllm(),
        "vllm_dspark",
        tmp_path,
        target=BUILTIN,
        path=tmp_path / "draft",
        tensors=tmp_path / "given.safetensors",
        result=tmp_path / "theirs.safetensors",
    )

    assert answer == {"class": "Qwen3DSparkForCausalLM", "layers": 2}
    theirs = load_file(tmp_path / "theirs.safetensors")
    with torch.inference_mode():
        known = torch.arange(ids.shape[1])[None]
        cache = draft.context_key_values(draft.project_context(features.context), known)
        hidden = draft.draft_block(anchors, positions, cache)
        embedding = draft.markov_head.embed(prev_tokens)
        ours = {
            "hidden": hidden,
            "logits": draft.base_logits(hidden),
            "bias": draft.markov_head.bias(embedding),
            "confidence": draft.confidence_head(hidden, embedding).sigmoid(),
        }
    rows = torch.arange(draft.lm_head.weight.shape[0])
    assert torch.equal(theirs.pop("proposed").long(), rows if draft.kept_tokens is None else draft.kept_tokens)
    for name, tensor in ours.items():
        difference = (theirs[name] - tensor).abs().max().item()
        print(f"{name}: spread {tensor.std():.3f}, largest difference {difference:.1e}")
        assert difference < 1e-4, name

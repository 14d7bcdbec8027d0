"""The drafts against the reference implementation."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import Golden, positions_of, token_batch
from torch import Tensor

from deepspec.drafts import build_draft_config
from deepspec.targets import Target


def run(golden: Golden) -> Tensor:
    inputs = golden.inputs
    return golden.draft(
        inputs["input_ids"],
        positions_of(golden),
        inputs["target_hidden_states"],
        inputs["anchor_positions"],
        inputs["block_keep_mask"],
    )


def previous_tokens(golden: Golden) -> Tensor:
    anchors = golden.inputs["input_ids"].gather(1, golden.inputs["anchor_positions"])
    return torch.cat([anchors[..., None], golden.outputs["target_ids"][..., :-1]], dim=-1)


def test_backbone_logits_and_confidence(golden: Golden) -> None:
    draft, outputs, kept = golden.draft, golden.outputs, golden.inputs["block_keep_mask"]
    hidden = run(golden)
    torch.testing.assert_close(hidden[kept], outputs["backbone_hidden"].view_as(hidden)[kept], rtol=1e-5, atol=1e-5 * 5)
    logits = draft.base_logits(hidden)
    previous = previous_tokens(golden)
    if draft.markov_head is not None:
        logits = logits + draft.markov_head.bias(draft.markov_head.latents(previous, hidden))
    supervised = outputs["eval_mask"]
    torch.testing.assert_close(logits[supervised], outputs["draft_logits_supervised"], rtol=1e-5, atol=1e-5 * 12)
    if draft.confidence_head is not None:
        assert draft.markov_head is not None
        confidence = draft.confidence_head(hidden, draft.markov_head.embed(previous))
        torch.testing.assert_close(confidence[kept], outputs["confidence_pred"][kept], rtol=1e-5, atol=1e-5)


def test_the_target_gives_the_reference_features(golden: Golden, golden_target: Target) -> None:
    ids = golden.inputs["input_ids"]
    features = golden_target.features(token_batch(ids), golden.draft.target_layer_ids)
    torch.testing.assert_close(features.context, golden.inputs["target_hidden_states"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(features.final, golden.inputs["target_last_hidden_states"], rtol=1e-5, atol=1e-4)


def test_config_on_disk_equals_the_published_one(
    golden: Golden, golden_target: Target, goldens: Path, tmp_path: Path
) -> None:
    dspark = golden.name != "dflash"
    golden.draft.config = build_draft_config(
        golden_target.config,
        algorithm="dspark" if dspark else "dflash",
        num_layers=2,
        block_size=7,
        target_layer_ids=[1, 3, 4],
        mask_token_id=511,
        markov_rank=16 if dspark else 0,
        markov_head_type=golden.name.removeprefix("dspark_") if dspark else "vanilla",
        confidence_head=dspark,
        confidence_head_with_markov=dspark,
        num_anchors=5,
        target_model_name_or_path="some/target",
        target_revision="main",
        target_fingerprint="abc",
    )
    golden.draft.save_pretrained(tmp_path)
    ours = json.loads((tmp_path / "config.json").read_text())
    published = json.loads((goldens / f"ckpt_{golden.name}" / "config.json").read_text())
    added = {
        "sample_from_anchor": True,
        "target_model_name_or_path": "some/target",
        "target_revision": "main",
        "target_fingerprint": "abc",
        "draft_algorithm": "dspark" if dspark else "dflash",
    }
    ours.pop("transformers_version"), published.pop("transformers_version")
    assert ours == published | added

"""Eagle3 against the reference implementation; its greedy traces are in test_decoding_goldens.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Golden, load_golden, positions_of
from torch import Tensor

from deepspec.config import LossConfig
from deepspec.drafts import Eagle3Model, build_draft_config
from deepspec.targets import Target
from deepspec.training.anchors import SlotLabels
from deepspec.training.metrics import summarize
from deepspec.training.objective import DraftTrainingModule

STEPS, DECAY, LENGTH = 7, 0.8, 48


@pytest.fixture
def eagle3() -> Golden:
    return load_golden("eagle3")


def chains(golden: Golden) -> dict[str, Tensor]:
    """A chain from every position but the first."""
    ids = golden.inputs["input_ids"]
    anchors = torch.arange(1, LENGTH).expand(len(ids), -1)
    return {
        "input_ids": ids,
        "position_ids": positions_of(golden),
        "context_features": golden.outputs["target_hidden_states"],
        "anchor_columns": anchors,
        "block_mask": torch.ones_like(anchors, dtype=torch.bool),
    }


def published_labels(golden: Golden, steps: range = range(STEPS)) -> SlotLabels:
    """The reference: step t of the chain at i = anchor - 1 counts by loss_mask[i + t], if position i + t + 1 exists."""
    position, step = torch.arange(LENGTH - 1)[:, None], torch.arange(STEPS)
    state = position + step + 1
    mask = golden.inputs["loss_mask"].bool()[:, (position + step).clamp(max=LENGTH - 1)]
    wanted = torch.tensor([number in steps for number in range(STEPS)])
    slots = (mask & (state < LENGTH) & wanted).flatten().nonzero().squeeze(1)
    row, place = slots // mask[0].numel(), slots % mask[0].numel()
    nobody = torch.zeros_like(slots)  # true tokens, which only the targets' shape is made of
    return SlotLabels(
        prev_tokens=torch.zeros(mask.shape, dtype=torch.long),
        slots=slots,
        targets=nobody,
        sources=row * LENGTH + state.flatten()[place],
        weights=DECAY ** (slots % STEPS).float(),
    )


def sums_of(golden: Golden, labels: SlotLabels) -> dict[str, Tensor]:
    loss = LossConfig(ce=1.0, tv=0.0, confidence=0.0, divisor="published")
    final = golden.inputs["target_last_hidden_states"]
    return DraftTrainingModule(golden.draft, loss)(**chains(golden), **vars(labels), final_features=final)


def test_states_and_logits_of_every_step(eagle3: Golden) -> None:
    assert isinstance(eagle3.draft, Eagle3Model)
    states = eagle3.draft.chain_states(**chains(eagle3))
    real = eagle3.outputs["attention_mask"].bool()
    for step in range(STEPS):
        token = torch.arange(1, LENGTH) + step
        compared = (token < LENGTH) & real[:, token.clamp(max=LENGTH - 1)]  # behind the end both mean nothing
        expected = eagle3.outputs[f"step{step}.hidden_states"][:, :-1]
        torch.testing.assert_close(states[:, :, step][compared], expected[compared], rtol=1e-5, atol=1e-5 * 40)
        if f"step{step}.draft_logits_some" in eagle3.outputs:
            logits = eagle3.draft.base_logits(eagle3.draft.norm(states[:, 20:24, step]))
            expected = eagle3.outputs[f"step{step}.draft_logits_some"]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * 12)


def test_losses_and_acceptance(eagle3: Golden) -> None:
    record, labels = eagle3.record, published_labels(eagle3)
    metrics = summarize(sums_of(eagle3, labels))
    assert metrics["loss"] == pytest.approx(record["losses"]["total"], rel=1e-5)
    for step in range(STEPS):
        assert metrics[f"accept_rate@{step + 1}"] == pytest.approx(record["metrics"][f"train/accept_rate@{step}"], 1e-5)
        alone = summarize(sums_of(eagle3, published_labels(eagle3, range(step, step + 1))))
        assert alone["loss"] / DECAY**step == pytest.approx(record["losses"][f"ploss_{step}"], rel=1e-5)


def test_every_gradient(eagle3: Golden) -> None:
    sums = sums_of(eagle3, published_labels(eagle3))
    assert sums["divisor"] == eagle3.inputs["input_ids"].numel()
    (sums["loss"] / sums["divisor"]).backward()
    grads = {name.removeprefix("grad."): value for name, value in eagle3.outputs.items() if name.startswith("grad.")}
    trained = dict(eagle3.draft.trainable_parameters())
    assert trained.keys() == grads.keys()
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        error = (parameter.grad - grads[name]).norm() / grads[name].norm()
        assert error < 1e-4, f"{name}: {error}"


def test_config_on_disk_equals_the_published_one(
    eagle3: Golden, golden_target: Target, goldens: Path, tmp_path: Path
) -> None:
    ours = {"target_model_name_or_path": "target", "target_revision": "main", "target_fingerprint": "abc"}
    eagle3.draft.config = build_draft_config(
        golden_target.config,
        algorithm="eagle3",
        architecture="Qwen3Eagle3Model",
        num_layers=1,
        block_size=7,
        target_layer_ids=None,
        mask_token_id=None,
        markov_rank=0,
        markov_head_type="vanilla",
        confidence_head=False,
        confidence_head_with_markov=False,
        num_anchors=5,
        **ours,
    )
    eagle3.draft.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    published = json.loads((goldens / "ckpt_eagle3" / "config.json").read_text())
    saved.pop("transformers_version"), published.pop("transformers_version")
    assert saved == published | ours | {"draft_algorithm": "eagle3"}

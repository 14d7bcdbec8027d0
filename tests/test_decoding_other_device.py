"""Rounds on the meta device: a tensor left on the CPU, or a value that the host asks for, raises."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_draft_config, tiny_target_config
from transformers import AutoModelForCausalLM

from deepspec.decoding import Request, proposer_of
from deepspec.decoding.cache import SlotCache
from deepspec.decoding.passes import target_pass
from deepspec.decoding.policies import ConfidenceThreshold, FixedLength
from deepspec.decoding.rounds import Batch, Rounds
from deepspec.decoding.sampling import SamplingSettings
from deepspec.decoding.span import Span
from deepspec.drafts import build_draft
from deepspec.targets import Target

META = torch.device("meta")
ROWS, COLUMNS = 2, 24
HEADLESS = {"markov_rank": 0, "confidence_head": False, "confidence_head_with_markov": False}
KINDS = {
    "dspark": {},
    "eagle3": {"algorithm": "eagle3", "num_layers": 1, "ttt_length": 5, "architecture": "Qwen3Eagle3Model", **HEADLESS},
}


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("kind", "threshold"), [("dspark", None), ("dspark", 0.5), ("eagle3", None)])
@torch.inference_mode()
def test_a_round_stays_on_its_device(kind: str, threshold: float | None, temperature: float, rule: str) -> None:
    with META:
        target = Target(AutoModelForCausalLM.from_config(tiny_target_config(), attn_implementation="sdpa"), "meta")
        draft = build_draft(tiny_draft_config(target.config, **KINDS[kind]), target)
    proposer = proposer_of(draft, target, allow_other_target=True)
    size = proposer.block_size
    proposer.allocate(ROWS, COLUMNS)
    cache = SlotCache(target, ROWS, COLUMNS, size + 1)
    ids = torch.zeros(7, dtype=torch.long, device=META)
    target_pass(target, proposer, cache, Span.of([0, 1], [0, 0], [3, 4], META), ids, is_certain=True)
    policy = FixedLength(size, META) if threshold is None else ConfidenceThreshold(threshold, size)
    settings = SamplingSettings.of_requests([Request([0], 1, temperature)] * ROWS, target.vocab_size, META)
    uniform = torch.zeros(ROWS, 2 * size + 1, dtype=torch.float64, device=META) if temperature else None
    anchors, lengths = torch.zeros(2, ROWS, dtype=torch.long, device=META)
    batch = Batch(ROWS, [3, 4], anchors, lengths, uniform, settings, COLUMNS)
    rounds = Rounds(target, proposer, cache, policy, rule, None)
    proposal = rounds.draft(batch)
    assert proposal is not None
    assert (proposal.probabilities is None) == (temperature == 0)
    if threshold is not None:
        with pytest.raises(RuntimeError, match="item"):  # the total, which only this round's confidences tell
            rounds.verify(batch, proposal)
        return
    outcome = rounds.verify(batch, proposal)
    for tensor in (proposal.tokens, outcome.finite, outcome.verdict.accepted, outcome.verdict.next_token):
        assert tensor.device == META

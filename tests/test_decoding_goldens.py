"""Greedy traces of the published reference implementation, round by round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deepspec import load_draft
from deepspec.decoding import Request, SpeculativeEngine, proposer_of
from deepspec.decoding.policies import ConfidenceThreshold
from deepspec.targets import load_target

GOLDENS = Path(__file__).parent / "goldens"
DRAFTS = ["dspark_vanilla", "dspark_gated", "dspark_rnn", "dflash", "eagle3"]
RUNS = ["default", "confidence_threshold_0.5", "stop_token"]


@pytest.fixture(scope="module")
def target():
    return load_target(str(GOLDENS / "target"))


def recorded(proposer, monkeypatch):
    """Every proposal of a single-row run: tokens and confidence logits."""
    proposals, propose = [], proposer.propose

    def record(*args):
        proposal = propose(*args)
        confidences = None if proposal.confidences is None else proposal.confidences[0].logit().tolist()
        proposals.append((proposal.tokens[0].tolist(), confidences))
        return proposal

    monkeypatch.setattr(proposer, "propose", record)
    return proposals


@pytest.mark.parametrize("run_name", RUNS)
@pytest.mark.parametrize("name", DRAFTS)
def test_golden_trace(name, run_name, target, monkeypatch):
    for case in json.loads((GOLDENS / f"{name}.json").read_text())["decode"]:
        if run_name not in case["runs"]:
            assert name in ("dflash", "eagle3")
            continue
        golden = case["runs"][run_name]
        proposer = proposer_of(load_draft(GOLDENS / f"ckpt_{name}"), target)
        proposals = recorded(proposer, monkeypatch)
        threshold = golden["confidence_threshold"]
        policy = ConfidenceThreshold(threshold, proposer.block_size) if threshold else None
        engine = SpeculativeEngine(target, proposer, max_length=128, policy=policy)
        request = Request(case["prompt"], max_new_tokens=64, stop_token_ids=tuple(golden["stop_token_ids"] or ()))
        completion = engine.generate([request])[0]
        assert completion.output_ids == golden["output_ids"]
        rounds = len(completion.rounds)
        assert len(golden["accepted_draft_lengths"]) - rounds in (0, 1)  # the reference may run a round past the limit
        assert [r.accepted for r in completion.rounds] == golden["accepted_draft_lengths"][:rounds]
        assert [r.proposed for r in completion.rounds] == golden["proposal_lengths"][:rounds]
        assert 1 + sum(r.emitted for r in completion.rounds) == len(golden["output_ids"])
        for (tokens, confidences), expected in zip(proposals, golden["proposals"], strict=False):
            verified = len(expected["draft"])
            assert tokens[:verified] == expected["draft"]
            if expected["confidence"]:
                torch.testing.assert_close(
                    torch.tensor(confidences[:verified]), torch.tensor(expected["confidence"]), atol=1e-4, rtol=1e-4
                )

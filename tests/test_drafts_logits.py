"""Scale and soft cap of the target's logits: what is trained is what is drawn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TinyBatch
from torch import Tensor

from deepspec.config import LossConfig
from deepspec.decoding import proposers
from deepspec.decoding.proposers import draw_block
from deepspec.decoding.requests import Request
from deepspec.decoding.sampling import SamplingSettings
from deepspec.drafts import DSparkModel
from deepspec.training.objective import DraftTrainingModule

MakeDraft = Callable[..., DSparkModel]
CHANGES = [
    {"logit_scale": 0.25},
    {"final_logit_softcapping": 2.0},
    {"logit_scale": 0.5, "final_logit_softcapping": 2.0, "markov_head_type": "rnn"},
    {"final_logit_softcapping": 2.0, "markov_rank": 0, "confidence_head": False, "algorithm": "dflash"},
    {"family": "gemma4"},
]


def by_hand(draft: DSparkModel, hidden: Tensor, latents: Tensor | None) -> Tensor:
    """scale * U, capped, + scale * B"""
    scale, cap = draft.settings.logit_scale, draft.settings.logit_softcap
    logits = scale * hidden @ draft.lm_head.weight.T
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits if latents is None else logits + scale * latents @ draft.markov_head.markov_w2.weight.T


@pytest.mark.parametrize("changes", CHANGES)
@torch.no_grad()
def test_drafted_probabilities_are_the_trained_ones(
    tiny_draft: MakeDraft, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = tiny_draft(**({"confidence_head_with_markov": False} | changes))
    hidden = torch.randn(3, draft.block_size, 32, generator=torch.Generator().manual_seed(0))
    anchors = torch.tensor([5, 17, 44])
    temperatures = torch.tensor([0.7, 1.0, 1.3])
    requests = [Request([1], 1, temperature=value) for value in temperatures.tolist()]
    settings = SamplingSettings.of_requests(requests, 61, hidden.device)
    uniform = torch.rand(3, draft.block_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for fused in (False, True):
        monkeypatch.setattr(proposers, "runs_in_triton", lambda *_, fused=fused: fused)
        results.append(draw_block(draft, anchors, hidden, settings, uniform))
    tokens, distribution = results[0]
    assert distribution is not None
    previous = torch.cat([anchors[:, None], tokens[:, :-1]], dim=1)
    latents = None if draft.markov_head is None else draft.markov_head.latents(previous, hidden)
    logits = by_hand(draft, hidden, latents)
    expected = (logits / temperatures[:, None, None]).softmax(-1)
    torch.testing.assert_close(distribution, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(results[1][0], tokens)
    torch.testing.assert_close(results[1][1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", CHANGES)
def test_the_objective_compares_the_same_probabilities(
    tiny_draft: MakeDraft, tiny_batch: TinyBatch, changes: dict[str, Any]
) -> None:
    draft = tiny_draft(**({"confidence_head_with_markov": False} | changes))
    inputs = tiny_batch.for_objective(draft.block_size, decay=4.0)
    sums = DraftTrainingModule(draft, LossConfig(ce=0.3, tv=0.7, confidence=0.0))(**inputs)
    hidden = draft(**tiny_batch.for_backbone())
    latents = None if draft.markov_head is None else draft.markov_head.latents(inputs["prev_tokens"], hidden)
    drafted = by_hand(draft, hidden, latents).flatten(0, 2)[inputs["slots"]].log_softmax(-1)
    final = tiny_batch.final_features.flatten(0, 1)[inputs["sources"]]
    wanted = by_hand(draft, final, None).softmax(-1)
    ce = -drafted.gather(1, inputs["targets"][:, None])[:, 0]
    loss = 0.3 * ce + 0.7 * (drafted.exp() - wanted).abs().sum(-1)
    expected = (inputs["weights"] * loss).sum()
    torch.testing.assert_close(sums["loss"], expected, rtol=1e-5, atol=1e-5)
    names = [name for name, _ in draft.trainable_parameters() if not name.startswith("confidence_head")]
    parameters = [draft.get_parameter(name) for name in names]
    ours, theirs = (torch.autograd.grad(value, parameters, retain_graph=True) for value in (sums["loss"], expected))
    for name, mine, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=name)

"""Sequential and confidence heads: the equations, and that stepping equals teacher forcing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deepspec.drafts import DSparkModel
from deepspec.drafts.heads import MARKOV_HEADS, GatedMarkovHead, RecurrentMarkovHead

MakeDraft = Callable[..., DSparkModel]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 60, (2, 3, 5), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("head_type", sorted(MARKOV_HEADS))
def test_stepping_equals_teacher_forcing(
    tiny_draft: MakeDraft, tokens: torch.Tensor, hidden: torch.Tensor, head_type: str
) -> None:
    head = tiny_draft(markov_head_type=head_type).markov_head
    assert head is not None
    together = head.latents(tokens, hidden)
    assert together.shape == (2, 3, 5, 8)
    state = head.initial_state(hidden[..., 0, :])
    for slot in range(5):  # slot 0 included
        latent, state = head.step(tokens[..., slot], hidden[..., slot, :], state)
        torch.testing.assert_close(latent, together[..., slot, :], rtol=1e-6, atol=1e-6)


def test_gate_reads_hidden_then_embedding(tiny_draft: MakeDraft, tokens: torch.Tensor, hidden: torch.Tensor) -> None:
    head = tiny_draft(markov_head_type="gated").markov_head
    assert isinstance(head, GatedMarkovHead)
    embedding = head.markov_w1.weight[tokens]
    weight, bias = head.gate_proj.weight, head.gate_proj.bias
    gate = torch.sigmoid(hidden @ weight[:, :32].T + embedding @ weight[:, 32:].T + bias)
    torch.testing.assert_close(head.latents(tokens, hidden), gate * embedding)


def test_recurrence(tiny_draft: MakeDraft, tokens: torch.Tensor, hidden: torch.Tensor) -> None:
    head = tiny_draft(markov_head_type="rnn").markov_head
    assert isinstance(head, RecurrentMarkovHead)
    weight, bias = head.joint_proj.weight, head.joint_proj.bias
    state = torch.zeros(2, 3, 8)
    latents = head.latents(tokens, hidden)
    for slot in range(5):
        embedding = head.markov_w1.weight[tokens[..., slot]]
        joint = state @ weight[:, :8].T + embedding @ weight[:, 8:16].T + hidden[..., slot, :] @ weight[:, 16:].T + bias
        gate, candidate, output = torch.sigmoid(joint[..., :8]), joint[..., 8:16].tanh(), joint[..., 16:].tanh()
        torch.testing.assert_close(latents[..., slot, :], output)
        state = gate * state + (1 - gate) * candidate


@pytest.mark.parametrize("head_type", sorted(MARKOV_HEADS))
def test_a_latent_never_reads_a_later_slot(
    tiny_draft: MakeDraft, tokens: torch.Tensor, hidden: torch.Tensor, head_type: str
) -> None:
    head = tiny_draft(markov_head_type=head_type).markov_head
    assert head is not None
    before = head.latents(tokens, hidden)
    changed_tokens, changed_hidden = tokens.clone(), hidden.clone()
    changed_tokens[..., 3] = (tokens[..., 3] + 1) % 60
    changed_hidden[..., 3, :] += 1
    after = head.latents(changed_tokens, changed_hidden)
    assert torch.equal(before[..., :3, :], after[..., :3, :])
    assert not torch.allclose(before[..., 3, :], after[..., 3, :])


def test_confidence_head_reads_the_embedding_only_if_asked(tiny_draft: MakeDraft, hidden: torch.Tensor) -> None:
    embedding = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(5))
    both, alone = tiny_draft().confidence_head, tiny_draft(confidence_head_with_markov=False).confidence_head
    assert both is not None
    assert alone is not None
    weight, bias = both.proj.weight[0], both.proj.bias
    torch.testing.assert_close(both(hidden, embedding), hidden @ weight[:32] + embedding @ weight[32:] + bias)
    torch.testing.assert_close(alone(hidden, embedding), hidden @ alone.proj.weight[0] + alone.proj.bias)
    with pytest.raises(ValueError, match="pass prev_embedding"):
        both(hidden)


def test_dflash_has_no_heads(tiny_draft: MakeDraft) -> None:
    draft = tiny_draft(algorithm="dflash", markov_rank=0, confidence_head=False)
    assert draft.markov_head is None
    assert draft.confidence_head is None
    assert draft.algorithm == "dflash"

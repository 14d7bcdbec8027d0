"""Sequential heads: a low-rank bias on the logits of slot k from the tokens before it (DSpark section 3).

All share W1 (token -> r) and W2 (r -> logits of what the draft can propose): B_k = W2 e_k (times the logit scale, where
the target has one), and only the latent e_k differs. Training asks for the latents of all slots at once, decoding steps
through them; both run the same code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from deepspec.config import ConfigError
from deepspec.drafts.configuration import DraftSettings


class MarkovHead(nn.Module):
    """Vanilla head, equation B_k = W2 W1[x_{k-1}], and the base of the others."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        rank: int,
        logit_scale: float = 1.0,
        draft_vocab_size: int | None = None,
    ):
        super().__init__()
        self.rank = rank
        self.logit_scale = logit_scale
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size or vocab_size, bias=False)

    def embed(self, prev_tokens: Tensor) -> Tensor:
        """W1[x]: [...] -> [..., rank]"""
        return self.markov_w1(prev_tokens)

    def bias(self, latents: Tensor) -> Tensor:
        """What to add to the base logits, in their scale: [..., rank] -> [..., vocab of the draft]"""
        return self.markov_w2(self.scaled(latents))

    def scaled(self, latents: Tensor) -> Tensor:
        """What W2 makes the bias of, in the scale of the logits."""
        return latents if self.logit_scale == 1 else latents * self.logit_scale

    def initial_state(self, hidden: Tensor) -> Tensor:
        """State before slot 1 for hidden states [..., hidden]."""
        return hidden.new_zeros(*hidden.shape[:-1], 0)

    def step(self, prev_tokens: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One slot.

        Args:
            prev_tokens: [...], the token before this slot (the anchor for slot 1).
            hidden: [..., hidden], the backbone's output at this slot.
            state: from `initial_state` or the slot before.

        Returns:
            The latent e_k [..., rank] and the next state.
        """
        return self.embed(prev_tokens), state

    def latents(self, prev_tokens: Tensor, hidden: Tensor) -> Tensor:
        """All slots with the true previous tokens: [..., slots], [..., slots, hidden] -> [..., slots, rank]"""
        return self.step(prev_tokens, hidden, self.initial_state(hidden))[0]


class GatedMarkovHead(MarkovHead):
    """B_k = W2 (sigmoid(G [h_k ; W1[x_{k-1}]]) * W1[x_{k-1}])"""

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, *args: Any):
        super().__init__(vocab_size, hidden_size, rank, *args)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def step(self, prev_tokens: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.embed(prev_tokens)
        gate = torch.sigmoid(self.gate_proj(torch.cat([hidden, embedding.to(hidden.dtype)], dim=-1)))
        return gate * embedding, state


class RecurrentMarkovHead(MarkovHead):
    """One linear of [s_{k-1} ; W1[x_{k-1}] ; h_k] gives gate, candidate and output.

    s_k = sigmoid(gate) * s_{k-1} + (1 - sigmoid(gate)) * tanh(candidate), s_0 = 0; B_k = W2 tanh(output).
    """

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, *args: Any):
        super().__init__(vocab_size, hidden_size, rank, *args)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def initial_state(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self.rank)

    def step(self, prev_tokens: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.embed(prev_tokens).to(hidden.dtype)
        joint = self.joint_proj(torch.cat([state.to(hidden.dtype), embedding, hidden], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)

    def latents(self, prev_tokens: Tensor, hidden: Tensor) -> Tensor:
        state = self.initial_state(hidden[..., 0, :])
        latents = []
        for slot in range(prev_tokens.shape[-1]):
            latent, state = self.step(prev_tokens[..., slot], hidden[..., slot, :], state)
            latents.append(latent)
        return torch.stack(latents, dim=-2)


MARKOV_HEADS: dict[str, type[MarkovHead]] = {
    "vanilla": MarkovHead,
    "gated": GatedMarkovHead,
    "rnn": RecurrentMarkovHead,
}


def build_markov_head(config: PreTrainedConfig) -> MarkovHead | None:
    """The head that a draft's config names; None for rank 0.

    Raises:
        ConfigError: no such head.
    """
    settings = DraftSettings.of(config)
    if settings.markov_rank == 0:
        return None
    if settings.markov_head_type not in MARKOV_HEADS:
        raise ConfigError(f"markov_head_type={settings.markov_head_type}: must be one of {', '.join(MARKOV_HEADS)}")
    head_class = MARKOV_HEADS[settings.markov_head_type]
    sizes = (config.vocab_size, config.hidden_size, settings.markov_rank)
    return head_class(*sizes, settings.logit_scale, settings.draft_vocab_size)

"""The confidence head: will the token of slot k survive, given that those before it did (DSpark section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from deepspec.drafts.configuration import DraftSettings


class ConfidenceHead(nn.Module):
    """c_k = sigmoid(w . [h_k ; W1[x_{k-1}]] + b), or of h_k alone."""

    def __init__(self, hidden_size: int, embedding_size: int):
        super().__init__()
        self.reads_embedding = embedding_size > 0
        self.proj = nn.Linear(hidden_size + embedding_size, 1)

    def forward(self, hidden: Tensor, prev_embedding: Tensor | None = None) -> Tensor:
        """Logit of c_k.

        Args:
            hidden: [..., hidden]
            prev_embedding: W1[x_{k-1}] [..., rank]; read only when the head was built with it.

        Returns:
            [...]
        """
        if self.reads_embedding:
            if prev_embedding is None:
                raise ValueError(
                    "this confidence head reads the previous token's Markov embedding: pass prev_embedding"
                )
            hidden = torch.cat([hidden, prev_embedding.to(hidden.dtype)], dim=-1)
        return self.proj(hidden).squeeze(-1)


def build_confidence_head(config: PreTrainedConfig) -> ConfidenceHead | None:
    """The head that a draft's config asks for, or None."""
    settings = DraftSettings.of(config)
    if not settings.confidence_head:
        return None
    return ConfidenceHead(config.hidden_size, settings.markov_rank if settings.confidence_head_with_markov else 0)

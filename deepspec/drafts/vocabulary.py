"""A draft's own vocabulary: all tokens of its target, or only those that it will ever propose.

A smaller head and a smaller table of the sequential head make a round cheaper. The target still gives every token its
due: what the draft cannot propose is only never accepted from it.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor, nn

from deepspec.config import ConfigError


def choose_tokens(counts: np.ndarray, special: Collection[int], size: int) -> np.ndarray:
    """The special tokens, and as many as there is room for of those that occur most; of equals the lower ids.

    Args:
        counts: [vocab], how often each token occurs.
        special: ids that are always kept.
        size: of the result, at most vocab.

    Returns:
        Ids [size], ascending.

    Raises:
        ConfigError: no room for the special tokens.
    """
    if len(special) > size:
        raise ConfigError(
            f"draft.vocab_size={size}: must be at least {len(special)}, the tokenizer's special tokens, which are "
            "always kept"
        )
    first = np.isin(np.arange(len(counts)), list(special))
    order = np.lexsort((-counts, ~first))  # stable: equals stay in the order of their ids
    return np.sort(order[:size])


class DraftVocabulary(nn.Module):
    """Mixin of a draft: which of the target's tokens its head knows.

    Where that is not all, a token has two ids: its row in the draft's head, in the order of the target's ids, and the
    target's. Two buffers, as engines read them, translate: `d2t`, int64 [rows], is what to add to a row to get the
    target's id; `t2d`, bool [vocab], is which of the target's tokens have a row.
    """

    d2t: Tensor
    t2d: Tensor
    is_pruned: bool

    def make_vocabulary(self, vocab_size: int, rows: int | None) -> None:
        """Args: `rows` of the head, for the first tokens until `keep_tokens` says which; None = all of them."""
        self.is_pruned = rows is not None
        if rows is not None:
            self.register_buffer("d2t", torch.zeros(rows, dtype=torch.long))
            self.register_buffer("t2d", torch.arange(vocab_size) < rows)

    @property
    def kept_tokens(self) -> Tensor | None:
        """The target's ids of the head's rows, long [rows]; None = all tokens have one."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t if self.is_pruned else None

    def keep_tokens(self, kept: Tensor) -> None:
        """Args: `kept`, the target's ids of the head's rows, long [rows], ascending."""
        self.d2t.copy_(kept.to(self.d2t.device) - torch.arange(len(kept), device=self.d2t.device))
        self.t2d.zero_()[kept] = True

    def check_vocabulary(self) -> None:
        """Raises ValueError: the buffers do not belong together, or have another form."""
        kept = self.kept_tokens
        if kept is None:
            return
        ascending = bool((kept.diff() > 0).all()) and int(kept[0]) >= 0 and int(kept[-1]) < len(self.t2d)
        if not ascending:
            raise ValueError(
                f"d2t: i + d2t[i] must be tokens of the target, 0 to {len(self.t2d) - 1}, ascending with i; these are "
                "not offsets"
            )
        if not torch.equal(self.t2d.nonzero().flatten(), kept):
            raise ValueError("t2d: does not name the tokens that d2t maps to")

    def target_ids(self, rows: Tensor) -> Tensor:
        """Of the head's rows, [...]"""
        return rows + self.d2t[rows] if self.is_pruned else rows

    def row_ids(self, tokens: Tensor) -> Tensor:
        """The head's rows of the target's ids [...]; -1 = it has none."""
        if not self.is_pruned:
            return tokens
        return torch.where(self.t2d[tokens], (self.t2d.cumsum(0) - 1)[tokens], -1)

    def rows_of(self, table: Tensor) -> Tensor:
        """Of a table with a row or column for every token of the target, those of the kept: [vocab, ...]"""
        kept = self.kept_tokens
        return table if kept is None else table[kept.to(table.device)]

    def over_target(self, probabilities: Tensor) -> Tensor:
        """With zeros for what the draft cannot propose: [..., rows] -> [..., vocab]"""
        kept = self.kept_tokens
        if kept is None:
            return probabilities
        everywhere = probabilities.new_zeros(*probabilities.shape[:-1], len(self.t2d))
        return everywhere.index_copy_(-1, kept, probabilities)

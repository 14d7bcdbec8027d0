"""Repetition penalty (Keskar et al. 2019, CTRL, section 4.1), lossless under speculation.

The logit of a token that prompt or output holds is divided by the penalty if positive, else multiplied by it. At each
position of the verify pass the drafted tokens before it count as output, so the target judges a token by the very
distribution that plain decoding would draw it from. A draft may leave the penalty out: that costs acceptance only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RepetitionPenalty:
    """The penalties of the rows of a batch, and the tokens that each row has seen."""

    factor: Tensor  # float32 [rows, 1, 1], 1 where off
    seen: Tensor  # bool [rows, vocab], the tokens of prompt and output, the anchor included

    def apply(self, logits: Tensor) -> Tensor:
        """Penalise what the rows have seen, at all positions alike: [rows, tokens, vocab] -> same shape, float32."""
        return penalise(logits, self.seen[:, None], self.factor)

    def apply_along(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Penalise the logits of a verify pass, where position k has seen ids[:, : k + 1] too.

        Args:
            logits: [rows, tokens, vocab]
            ids: long [rows, tokens], the anchor and the drafted tokens.

        Returns:
            [rows, tokens, vocab], float32
        """
        return penalise(logits, seen_along(self.seen, ids), self.factor)

    def of_columns(self, columns: Tensor | None) -> RepetitionPenalty:
        """Of some tokens of the vocabulary, long [columns]; None = all."""
        return self if columns is None else replace(self, seen=self.seen[:, columns])

    def after(self, tokens: Tensor) -> RepetitionPenalty:
        """The same with tokens, long [rows, 1], seen as well; `seen` of this one does not change."""
        return replace(self, seen=self.seen.scatter(1, tokens, True))

    def keep(self, ids: Tensor, accepted: Tensor, next_token: Tensor) -> None:
        """Mark in `seen`, in place, what a round has added.

        Args:
            ids: long [rows, tokens], the anchor and the drafted tokens.
            accepted: long [rows], how many of the drafted ones are kept.
            next_token: long [rows], the token after them.
        """
        kept = torch.arange(ids.shape[1], device=ids.device) <= accepted[:, None]
        added = torch.cat([torch.where(kept, ids, ids[:, :1]), next_token[:, None]], dim=1)
        self.seen.scatter_(1, added, True)


def penalise(logits: Tensor, seen: Tensor, factor: Tensor) -> Tensor:
    """Divide the positive logits of seen tokens by `factor` and multiply the others, in float32.

    Args:
        logits: [rows, tokens, vocab]
        seen: bool, broadcasts over the logits.
        factor: float32 [rows, 1, 1]; 1 leaves a row as it is, bit for bit.
    """
    logits = logits.float()
    return torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)


def seen_along(seen: Tensor, ids: Tensor) -> Tensor:
    """What each position of a verify pass has seen: `seen` and the tokens up to its own.

    Args:
        seen: bool [rows, vocab]
        ids: long [rows, tokens]

    Returns:
        bool [rows, tokens, vocab]
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    so_far = ids[
        :, torch.minimum(place[:, None], place)
    ]  # [rows, tokens, tokens]: row k is ids[: k + 1], last repeated
    return seen[:, None].repeat(1, ids.shape[1], 1).scatter_(2, so_far, True)


def seen_in(ids: Tensor, vocab: int) -> Tensor:
    """Which tokens the rows hold: long [rows, tokens] -> bool [rows, vocab]"""
    return torch.zeros(len(ids), vocab, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)

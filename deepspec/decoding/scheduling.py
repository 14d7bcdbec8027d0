"""Which drafted tokens of a batch are worth verifying (DSpark section 4, algorithm 1).

All rows' drafted tokens compete for places in one pass of the target, best survival first. Survival never rises along a
row, so whatever number of places there is, each row gets a prefix of its block.

What may decide. Token j of a row may be verified or not by what its survival tells, which comes from the tokens before
it, and by tokens that rank before it; never by token j itself or by what follows from it. Else the kept tokens are a
biased sample: "verify if it goes on well" throws away first tokens that go on badly. `places_until_first_drop` looks at
the ranking in order and stops for good, so it keeps this rule. `best_places` looks at the whole ranking; from the
current confidences it would break the rule (paper, appendix A: P(A) = 0.85 instead of 0.70), so it may only see
confidences of earlier rounds.

Tensors stay on their device, nothing here waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepspec.config import ConfigError
from deepspec.decoding.sps import SpsTable


def survivals(confidences: Tensor) -> Tensor:
    """a_{r,j} = prod_{i <= j} c_{r,i}, float64, never rising along a row: [rows, slots] -> [rows, slots].

    Args:
        confidences: c_{r,j}, P(token j kept given that those before it were). NaN, a row that failed, counts as 0.
    """
    products = confidences.double().nan_to_num(nan=0.0).cumprod(1)
    return products.cummin(1).values  # a product built in another order may rise by a rounding error


@dataclass(frozen=True)
class Ranking:
    """All drafted tokens of a batch, best survival first; ties by slot, then by row."""

    survival: Tensor  # float64 [rows * slots], never rising
    row: Tensor  # long [rows * slots], whose token it is
    rows: int

    @classmethod
    def of(cls, confidences: Tensor) -> Ranking:
        """Args: confidences [rows, slots]."""
        rows = len(confidences)
        by_slot = survivals(confidences).T.reshape(-1)
        ordered = by_slot.sort(descending=True, stable=True)
        return cls(ordered.values, ordered.indices % max(rows, 1), rows)

    def lengths(self, places: Tensor | int) -> Tensor:
        """How many tokens of each row are among the first `places`: long [rows]."""
        admitted = torch.arange(len(self.row), device=self.row.device) < places
        return torch.zeros(self.rows, dtype=torch.long, device=self.row.device).scatter_add_(
            0, self.row, admitted.long()
        )

    def throughput(self, seconds: Tensor) -> Tensor:
        """Expected tokens per second when the first n tokens are verified: tau * SPS(B), for n = 0..rows * slots.

        tau = rows (each emits one token anyway) + the survival of the admitted; B = rows + n.

        Args:
            seconds: 1 / SPS(rows + n), float64 [rows * slots + 1].
        """
        kept = torch.cat([self.survival.new_zeros(1), self.survival.cumsum(0)])
        return (self.rows + kept) / seconds


def places_until_first_drop(throughput: Tensor) -> Tensor:
    """Admit while the expected throughput rises; the first token that does not raise it ends the admission.

    Returns:
        The number of admitted tokens, long [].
    """
    return (throughput[1:] > throughput[:-1]).long().cumprod(0).sum()


def best_places(throughput: Tensor) -> Tensor:
    """The number of tokens with the largest expected throughput of all, the smallest of equals: long []."""
    return throughput.argmax()


class RoundCost:
    """Seconds of a round by rows and verified tokens, looked up on the device."""

    def __init__(self, table: SpsTable, rows: int, block_size: int, device: torch.device | str = "cpu"):
        """Args: `rows`, the most there will be."""
        self.rows, self._block_size = rows, block_size
        sizes = np.arange(rows * (block_size + 1) + 1)
        self._pass = torch.as_tensor(table.pass_seconds(sizes), device=device)
        self._beside = table.beside_seconds(sizes[: rows + 1]).tolist()
        self._plain = table.round_seconds(sizes[: rows + 1], sizes[: rows + 1], drafting=False).tolist()

    def for_blocks_of(self, size: int) -> RoundCost:
        """Itself. Raises ConfigError when it was made for shorter blocks."""
        if size > self._block_size:
            raise ConfigError(
                f"RoundCost: made for blocks of {self._block_size} tokens, but asked about {size}; give it the block "
                "size of the policy"
            )
        return self

    def seconds(self, rows: int, slots: int) -> Tensor:
        """Of a round that verifies n = 0..rows * slots drafted tokens: float64 [rows * slots + 1]."""
        return self._pass[rows : rows * (slots + 1) + 1] + self._beside[rows]

    def plain_seconds(self, rows: int) -> float:
        """Of a round that does not draft."""
        return self._plain[rows]

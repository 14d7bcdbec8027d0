"""Near-duplicates among millions of texts: MinHash signatures, and banding over all of them at once.

Signatures and the number of bands are datasketch's. Its index is not used: it takes 3.3 KB of memory a text, and the
same groups come out of sorting the signatures, which may lie on disk at 512 bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from datasketch import MinHash, MinHashLSH

from deepspec.data.words import FACTOR, ngrams

PERMUTATIONS = 128
SHINGLE = 3  # tokens
SEED = 1  # of the permutations: the same texts are near in every run
NEIGHBOURS = 4  # of a group of equal bands that a text is compared with, beside the group's first
COMPARED_AT_ONCE = 2**16  # pairs


class Signer:
    """Makes signatures whose share of equal entries estimates the Jaccard similarity of two texts' shingles."""

    def __init__(self) -> None:
        self._minhash = MinHash(PERMUTATIONS, seed=SEED, hashfunc=int)

    def sign(self, hashes: np.ndarray) -> np.ndarray:
        """uint32 [PERMUTATIONS] of a text's word hashes, see `deepspec.data.words`."""
        self._minhash.clear()
        self._minhash.update_batch((ngrams(hashes, SHINGLE) >> np.uint64(32)).tolist())
        return self._minhash.hashvalues


@dataclass(frozen=True)
class NearDuplicate:
    """A text that is near an earlier one (which may itself be near one that is still earlier)."""

    index: int
    earlier: int
    similarity: float  # estimated


def find_near_duplicates(signatures: np.ndarray, threshold: float) -> list[NearDuplicate]:
    """The texts, in order, that are at least `threshold` similar to an earlier one.

    Args:
        signatures: uint32 [texts, PERMUTATIONS]; may be memory-mapped.
        threshold: Jaccard similarity, in (0, 1].
    """
    pairs = _candidates(signatures, threshold)
    found: dict[int, NearDuplicate] = {}
    for start in range(0, len(pairs), COMPARED_AT_ONCE):
        later, earlier = pairs[start : start + COMPARED_AT_ONCE].T
        similarity = (signatures[later] == signatures[earlier]).mean(axis=1)
        for place in np.flatnonzero(similarity >= threshold):
            index = int(later[place])
            found.setdefault(index, NearDuplicate(index, int(earlier[place]), float(similarity[place])))
    return [found[index] for index in sorted(found)]


def _candidates(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Pairs (later, earlier) that agree in a whole band, int64 [pairs, 2], sorted."""
    shape = MinHashLSH(threshold=min(threshold, 0.99), num_perm=PERMUTATIONS)
    pairs = [np.empty((0, 2), np.int64)]
    for band in range(shape.b):
        keys = np.zeros(len(signatures), np.uint64)
        for column in range(band * shape.r, (band + 1) * shape.r):
            keys = keys * FACTOR + signatures[:, column]
        order = np.argsort(keys, kind="stable")  # equal keys stay in the order of the texts
        starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order][:1] + np.uint64(1)))
        group_start = np.repeat(starts, np.diff(starts, append=len(order)))
        places = np.arange(len(order))
        for other in (group_start, *(places - step for step in range(1, NEIGHBOURS + 1))):
            valid = (other >= group_start) & (other < places)
            pairs.append(np.stack([order[valid], order[other[valid]]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)

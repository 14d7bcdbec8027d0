"""Texts as sequences of word hashes, for comparing millions of them."""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
import xxhash

# Scripts written without spaces count by character: kana, Han, Hangul.
UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
# A character of those, a word, or a symbol that carries meaning ("3 + 4" is not "3 - 4"); punctuation is left out.
TOKENS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s.,;:!?'\"…]")
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # of the rolling hash; odd
WORD = np.uint64(1)  # lowest bit of a hash: set in those of words, not in those of symbols


def hash_words(text: str) -> np.ndarray:
    """Hashes of the words and symbols of a text in lower case, uint64 [words and symbols].

    Texts that differ in case, spacing or punctuation alone have the same.
    """
    tokens = TOKENS.findall(text.lower())
    return np.fromiter(map(_hash, tokens), np.uint64, len(tokens))


@lru_cache(maxsize=2**18)
def _hash(token: str) -> int:
    hashed = xxhash.xxh3_64_intdigest(token.encode("utf-8", "surrogatepass"))
    return hashed | 1 if token[0].isalnum() or token[0] == "_" else hashed & ~1


def without_symbols(hashes: np.ndarray) -> np.ndarray:
    """The hashes of words alone."""
    return hashes[(hashes & WORD) == WORD]


def digest_of(hashes: np.ndarray) -> int:
    """64 bits of a whole text."""
    return xxhash.xxh3_64_intdigest(hashes.tobytes())


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hashes of every run of n, in order; of all of them together where there are fewer.

    Returns:
        uint64 [max(len(hashes) - n + 1, 1)], or [0] of an empty text.
    """
    n = min(n, len(hashes))
    runs = len(hashes) - n + 1 if n else 0
    rolled = np.zeros(runs, np.uint64)
    for offset in range(n):
        rolled *= FACTOR
        rolled += hashes[offset : offset + runs]
    return rolled

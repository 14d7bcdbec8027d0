"""From all that was written to the prompts that are kept: filtered, without duplicates, in the order of attempts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deepspec.data.near_duplicates import Signer, find_near_duplicates
from deepspec.data.words import digest_of, hash_words
from deepspec.synthesis.filters import PromptFilter


class Attempt(NamedTuple):
    """A text that the target wrote in a user's place."""

    number: int
    text: str
    is_cut: bool  # it did not end within max_new_tokens


@dataclass(frozen=True)
class Selection:
    """What is kept."""

    kept: list[Attempt]  # in order
    reasons: Counter[str]  # why the others are not


class Selector:
    """Selects again and again as attempts are added; looks at each text once."""

    def __init__(self, prompt_filter: PromptFilter, near_duplicates: float):
        """Args: `near_duplicates` similarity (Jaccard) from which the later of two is left out; 1 = exact ones only."""
        self._filter, self._threshold = prompt_filter, near_duplicates
        self._signer = Signer()
        self._seen: dict[int, tuple[str | None, int, np.ndarray | None]] = {}  # reason, hash and signature, by number

    def select(self, attempts: Iterable[Attempt]) -> Selection:
        """Earlier attempts come first, whenever they were made: the outcome does not depend on who finished when."""
        reasons: Counter[str] = Counter()
        hashes: set[int] = set()
        candidates: list[Attempt] = []
        signatures: list[np.ndarray] = []
        for attempt in sorted(attempts):
            reason, text_hash, signature = self._look(attempt)
            if reason is None and text_hash in hashes:
                reason = "duplicate"
            if reason is not None or signature is None:
                reasons[reason or "empty"] += 1
                continue
            hashes.add(text_hash)
            candidates.append(attempt)
            signatures.append(signature)
        near = set()
        if candidates and self._threshold < 1:
            near = {found.index for found in find_near_duplicates(np.stack(signatures), self._threshold)}
        if near:
            reasons["near_duplicate"] = len(near)
        return Selection([attempt for index, attempt in enumerate(candidates) if index not in near], reasons)

    def _look(self, attempt: Attempt) -> tuple[str | None, int, np.ndarray | None]:
        if attempt.number not in self._seen:
            reason = "cut" if attempt.is_cut else self._filter.reason_against(attempt.text)
            words = hash_words(attempt.text)
            signature = None if reason else self._signer.sign(words).copy()
            self._seen[attempt.number] = (reason, digest_of(words), signature)
        return self._seen[attempt.number]

"""Which of the texts that a target wrote in a user's place are prompts worth answering."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from deepspec.config import ConfigError
from deepspec.data.words import hash_words, ngrams, without_symbols

CONTROL = re.compile(r"<\|[^|\n]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(start|end)_of_turn>|</?think>|\ufffd")
# How a text begins in which the target answers instead of asking.
BEGINNINGS = (
    r"(sure|certainly|absolutely)\b\s*[,.!]|of course\b|great question|you'?re welcome|i hope this helps",
    r"i'?m sorry|i am sorry|i apologi[sz]e|sorry, but|i can(no|')t (assist|help|provide|fulfil)|thanks? (you )?for",
    r"as an ai\b|i('?m| am) (just |only )?an? (ai|language|virtual|chat)",
    r"i'?d be (happy|glad|delighted) to|i('?m| am) (here|happy|glad|delighted) to (help|assist)",
    r"((hello|hi|hey)\b.{0,40})?how (can|may) i (help|assist)|(assistant|ai|answer)\s*:",
    r"here (is|are)\b|here'?s (a|an|the|how|some|my|your)\b",
)
ASSISTANT = re.compile(rf"\W*({'|'.join(BEGINNINGS)})", re.IGNORECASE | re.DOTALL)
ADMITS = re.compile(r"\bas an? (ai|artificial intelligence|language)( language)? (model|assistant)\b", re.IGNORECASE)
NGRAM = 4  # words of a run that must not come again and again
FEW_WORDS = 12  # below, nothing is told from repetition
TELLING, POSSIBLE = 0.1, 0.02  # probabilities: of the likeliest language, and of those that are wanted


@dataclass(frozen=True)
class FilterSettings:
    """What a prompt must be like."""

    min_words: int
    max_words: int
    languages: tuple[str, ...]  # ISO 639-1; empty = any
    max_repetition: float  # share of runs of four words that were there before


class PromptFilter:
    """Gives the reason why a text is no prompt."""

    def __init__(self, settings: FilterSettings, control_tokens: Collection[str] = ()):
        """
        Args:
            control_tokens: of the target's tokenizer.

        Raises:
            ConfigError: an unknown language.
        """
        self._settings = settings
        self._control = [token for token in control_tokens if token.strip()]
        if settings.languages:
            known = set(self._identifier.labels)
            if unknown := [language for language in settings.languages if language not in known]:
                raise ConfigError(
                    f"languages: unknown '{unknown[0]}'; known are {', '.join(sorted(known))} (ISO 639-1), [] = any"
                )

    @cached_property
    def _identifier(self) -> LanguageIdentifier:
        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def reason_against(self, text: str) -> str | None:
        """None = it is a prompt."""
        hashes = hash_words(text)
        words = len(without_symbols(hashes))
        if not words:
            return "empty"
        if CONTROL.search(text) or any(token in text for token in self._control):
            return "control_token"
        if words < self._settings.min_words:
            return "short"
        if words > self._settings.max_words:
            return "long"
        if ASSISTANT.match(text) or ADMITS.search(text):
            return "assistant_like"
        if repetition(hashes) > self._settings.max_repetition or repeats_lines(text):
            return "repetitive"
        if self._settings.languages and not self.is_in_language(text):
            return "language"
        return None

    def is_in_language(self, text: str) -> bool:
        """Whether it may be in one of those that are wanted. Short texts, sums and code look like many languages."""
        probabilities = dict(self._identifier.rank(text))
        is_telling = max(probabilities.values()) >= TELLING
        return not is_telling or sum(probabilities[each] for each in self._settings.languages) >= POSSIBLE


def repetition(hashes: np.ndarray) -> float:
    """The share of runs of four words that were there before; 0 for a text of few words.

    Args:
        hashes: uint64 [words and symbols]
    """
    if len(hashes) < FEW_WORDS:
        return 0.0
    runs = ngrams(hashes, NGRAM)
    return 1 - len(np.unique(runs)) / len(runs)


def repeats_lines(text: str) -> bool:
    """Whether a third of four or more lines are one and the same."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return len(lines) >= 4 and max(Counter(lines).values()) * 3 > len(lines)

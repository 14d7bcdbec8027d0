"""Finding evaluation prompts in training data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from deepspec.config import ConfigError
from deepspec.data.conversation import Message
from deepspec.data.formats import read_conversations
from deepspec.data.jsonl import DataError
from deepspec.data.words import digest_of, hash_words, ngrams, without_symbols

NGRAM = 13  # words
# An n-gram in more prompts of a set than this is its wording ("put your final answer within \boxed{}"), not content.
COMMON_PROMPTS, COMMON_SHARE = 10, 0.1


def text_of(message: Message) -> str:
    """The text of a message: its content, or the text parts of it."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = [part if isinstance(part, str) else part.get("text") for part in content or []]
    return "\n".join(part for part in parts if isinstance(part, str))


class EvaluationPrompts:
    """The prompts of evaluation sets, to ask whether a text holds one of them.

    A text does if it shares a run of 13 words with a prompt (in lower case, without punctuation and symbols), or if it
    is a prompt as a whole, which is how prompts shorter than that are found.
    """

    def __init__(self, files: list[Path], say: Callable[[str], None]):
        """Read the sets, one file each.

        Args:
            say: told which sets there are, and what of them is ignored as their wording.

        Raises:
            DataError: a file cannot be read or is of no known format.
        """
        self._wholes: dict[int, str] = {}
        self._places: list[str] = []
        grams, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for file in files:
            own_grams, own_owners = self._read(file)
            counts = Counter(own_grams.tolist())
            limit = max(COMMON_PROMPTS, COMMON_SHARE * len(set(own_owners.tolist())))
            common = np.array([gram for gram, count in counts.items() if count > limit], np.uint64)
            kept = ~np.isin(own_grams, common)
            grams.append(own_grams[kept])
            owners.append(own_owners[kept])
            if len(common):
                say(
                    f"{file}: {len(common)} runs of {NGRAM} words are in over {limit:.0f} prompts: its wording, ignored"
                )
        together = np.concatenate(grams)
        self._grams, first = np.unique(together, return_index=True)
        self._owners = np.concatenate(owners)[first]
        say(f"evaluation sets: {len(self._places)} prompts of {', '.join(file.stem for file in files)}")

    def _read(self, file: Path) -> tuple[np.ndarray, np.ndarray]:
        """(hashes, number of the prompt that each is of); a hash counts once for each prompt."""
        grams, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for conversation in read_conversations([str(file)], on_format=lambda line: None):
            turns = [hash_words(text_of(m)) for m in conversation.messages if m["role"] == "user"]
            for turn in turns:
                if len(turn):
                    self._wholes.setdefault(digest_of(turn), conversation.place)
            long = [words for turn in turns if len(words := without_symbols(turn)) >= NGRAM]
            if long:
                own = np.unique(np.concatenate([ngrams(words, NGRAM) for words in long]))
                grams.append(own)
                owners.append(np.full(len(own), len(self._places)))
            self._places.append(conversation.place)
        return np.concatenate(grams), np.concatenate(owners)

    def find(self, hashes: np.ndarray) -> str | None:
        """ "SET, line N" of a prompt that a text of these word hashes holds; None if it holds none."""
        if place := self._wholes.get(digest_of(hashes)):
            return place
        words = without_symbols(hashes)
        if len(words) < NGRAM or not len(self._grams):
            return None
        runs = ngrams(words, NGRAM)
        at = np.minimum(np.searchsorted(self._grams, runs), len(self._grams) - 1)
        hits = np.flatnonzero(self._grams[at] == runs)
        return self._places[self._owners[at[hits[0]]]] if len(hits) else None


def evaluation_files(folder: str | Path) -> list[Path]:
    """The sets of a folder, a JSONL file each, in sorted order.

    Raises:
        ConfigError: there is no such folder.
        DataError: it holds no sets.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f'eval_dir={folder}: no such folder; give one with JSONL files of {{"turns": [...]}}')
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise DataError(f"eval_dir={folder}: holds no .jsonl files; give the folder of the evaluation sets")
    return files

"""Conversations to a memory-mapped dataset of token ids and loss masks, made once and shared by every rank."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from deepspec.config import ConfigError
from deepspec.data.jsonl import DataError
from deepspec.data.packing import Sample
from deepspec.data.templates import ChatTemplate
from deepspec.data.tokenized import tokenized_rows

logger = logging.getLogger(__name__)


class ConversationDataset(torch.utils.data.Dataset):
    """Samples by (index, epoch), see `deepspec.data.sampler`."""

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, epoch = key
        row = self.rows[int(index)]
        return Sample(index, epoch, row["id"], row["input_ids"], row["loss_mask"])

    def first(self, count: int | None) -> ConversationDataset:
        """The first `count` samples; None = all."""
        return self if count is None else ConversationDataset(self.rows.select(range(min(count, len(self)))))

    def lengths(self) -> np.ndarray:
        """Tokens of every sample."""
        return np.asarray(self.rows.with_format("numpy")["tokens"][:])

    def supervised_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token is one to predict, [vocab_size]."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for table in self.rows.select_columns(["input_ids", "loss_mask"]).with_format("arrow").iter(batch_size=1000):
            ids, mask = (np.concatenate([c.flatten().to_numpy() for c in column.chunks]) for column in table.columns)
            counts += np.bincount(ids[mask.astype(bool)], minlength=vocab_size)
        return counts

    def id_of(self, index: int) -> str:
        return self.rows[int(index)]["id"]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, target_path: str) -> None:
    """Refuse a tokenizer that can produce ids outside the target's embedding.

    Raises:
        ConfigError: naming the largest id and the vocabulary size.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ConfigError(
            f"target.path={target_path}: the tokenizer has ids up to {largest}, but the target has a vocabulary of "
            f"{vocab_size}; they do not belong together: put the tokenizer there that the target was trained with"
        )


def tokenize_conversations(
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    min_supervised_tokens: int,
    template_options: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
    template_name: str = "the chat template",
    on_bad_row: str = "stop",
    cache_dir: str = "outputs/cache/tokenized",
) -> ConversationDataset:
    """Render and tokenize conversations, see `deepspec.data.formats` for where they may come from.

    Longer samples are cut to `max_length` tokens; samples with fewer than `min_supervised_tokens` assistant tokens left
    are dropped; both are counted in the log.

    Args:
        template_name: for messages.
        on_bad_row: stop, or skip and count.
        cache_dir: see `tokenized_rows`.

    Raises:
        DataError: a source that cannot be read, a bad row (with `stop`), or no sample left.
    """
    template = ChatTemplate(tokenizer, template_options, system_prompt, template_name)
    rows = tokenized_rows(files, template, max_length=max_length, on_bad_row=on_bad_row, cache_dir=cache_dir)
    columns = rows.with_format("numpy")
    supervised = np.asarray(columns["supervised"][:])
    problems = list(rows["problem"])
    is_sample = np.array([not problem for problem in problems], dtype=bool)
    samples = int(is_sample.sum())
    kept = np.flatnonzero((supervised >= min_supervised_tokens) & is_sample)
    if bad := len(problems) - samples:
        first = next(filter(None, problems))
        logger.warning("%d rows cannot be used and were skipped, the first: %s", bad, first)
    if truncated := int(np.asarray(columns["truncated"][:]).sum()):
        logger.warning(
            "%d of %d samples are longer than data.max_length=%d and were cut", truncated, samples, max_length
        )
    if len(kept) < samples:
        logger.warning(
            "%d of %d samples have fewer than data.min_supervised_tokens=%d assistant tokens and were dropped",
            samples - len(kept),
            samples,
            min_supervised_tokens,
        )
    if len(kept) == 0:
        raise DataError(
            f"{', '.join(files)}: no sample is left: all {samples} have fewer than data.min_supervised_tokens="
            f"{min_supervised_tokens} assistant tokens within data.max_length={max_length}; "
            "raise the length or lower the bound"
        )
    return ConversationDataset(rows.select(kept))

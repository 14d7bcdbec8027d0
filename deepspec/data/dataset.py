"""Conversations to a memory-mapped dataset of token ids and loss masks, made once and shared by every rank."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from deepspec.config import ConfigError
from deepspec.data.chat import render_conversation
from deepspec.data.jsonl import DataError, check_file, read_jsonl
from deepspec.data.packing import Sample
from deepspec.files import sha256_of

logger = logging.getLogger(__name__)

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "loss_mask": datasets.List(datasets.Value("uint8")),
        "truncated": datasets.Value("bool"),
        "tokens": datasets.Value("int32"),
        "supervised": datasets.Value("int32"),
    }
)


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
    cache_dir: str = "outputs/cache/tokenized",
) -> ConversationDataset:
    """Render and tokenize JSONL files of `{"id"?, "messages": [{"role", "content"}, ...]}`.

    The result is an Arrow file under `cache_dir`, named by a digest of the files' content, the tokenizer, the template,
    its options and `max_length`: made once, never stale. Longer samples are cut to `max_length` tokens; samples
    with fewer than `min_supervised_tokens` assistant tokens left are dropped; both are counted in the log.

    Raises:
        DataError: a bad file or line, a row without an assistant turn, or no sample left.
    """
    options = dict(template_options or {})
    digest = _content_digest(files, tokenizer, options, max_length)
    try:
        rows = datasets.Dataset.from_generator(
            _tokenized_rows,
            features=FEATURES,
            cache_dir=cache_dir,
            gen_kwargs={"files": list(files), "tokenizer": tokenizer, "options": options, "max_length": max_length},
            fingerprint=digest,
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise
    supervised = np.asarray(rows.with_format("numpy")["supervised"][:])
    kept = np.flatnonzero(supervised >= min_supervised_tokens)
    truncated = int(np.asarray(rows.with_format("numpy")["truncated"][:]).sum())
    if truncated:
        logger.warning(
            "%d of %d samples are longer than data.max_length=%d and were cut", truncated, len(rows), max_length
        )
    if len(kept) < len(rows):
        logger.warning(
            "%d of %d samples have fewer than data.min_supervised_tokens=%d assistant tokens and were dropped",
            len(rows) - len(kept),
            len(rows),
            min_supervised_tokens,
        )
    if len(kept) == 0:
        raise DataError(
            f"{', '.join(files)}: no sample is left: all {len(rows)} have fewer than data.min_supervised_tokens="
            f"{min_supervised_tokens} assistant tokens within data.max_length={max_length}; "
            "raise the length or lower the bound"
        )
    return ConversationDataset(rows.select(kept))


def _tokenized_rows(
    files: list[str], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], max_length: int
) -> Iterator[dict[str, Any]]:
    for file in files:
        for place, row in read_jsonl(file):
            messages = _checked_messages(place, row)
            try:
                rendered = render_conversation(tokenizer, messages, options)
            except ValueError as error:
                raise DataError(f"{place}: {error}") from error
            loss_mask = rendered.loss_mask[:max_length]
            yield {
                "id": str(row.get("id", place)),
                "input_ids": rendered.input_ids[:max_length],
                "loss_mask": loss_mask,
                "truncated": len(rendered.input_ids) > max_length,
                "tokens": len(loss_mask),
                "supervised": sum(loss_mask),
            }


def _checked_messages(place: str, row: dict[str, Any]) -> list[dict[str, str]]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: expected a non-empty list under 'messages', found the keys {sorted(row)}")
    for number, message in enumerate(messages):
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise DataError(
                f"{place}: message {number} needs a string under 'role' and under 'content', found {message!r:.80}"
            )
    return messages


def _content_digest(
    files: Sequence[str], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], max_length: int
) -> str:
    digest = hashlib.sha256()
    for file in files:
        check_file(file)
        digest.update(sha256_of(file).encode())
    settings = [
        sorted(FEATURES),
        tokenizer.chat_template,
        sorted(tokenizer.get_vocab().items()),
        dict(options),
        max_length,
        list(files),
    ]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]

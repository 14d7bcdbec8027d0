"""Conversations to a memory-mapped dataset of token ids and loss masks, made once and shared by every rank."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from deepspec.config import ConfigError
from deepspec.data.chat import tokenize
from deepspec.data.conversation import Conversation
from deepspec.data.formats import read_conversations
from deepspec.data.jsonl import DataError, RowError
from deepspec.data.packing import Sample
from deepspec.data.samples import Sample as Pieces
from deepspec.data.samples import write_samples
from deepspec.data.sources import source_digest
from deepspec.data.surrogates import mend
from deepspec.data.templates import ChatTemplate

logger = logging.getLogger(__name__)

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "loss_mask": datasets.List(datasets.Value("uint8")),
        "truncated": datasets.Value("bool"),
        "tokens": datasets.Value("int32"),
        "supervised": datasets.Value("int32"),
        "problem": datasets.Value("string"),  # why the row cannot be used; "" = it can
    }
)
TOGETHER = 256  # conversations tokenized at once
RENDERING = 2  # to be raised when the same conversation becomes other tokens


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
    system_prompt: str | None = None,
    template_name: str = "the chat template",
    on_bad_row: str = "stop",
    cache_dir: str = "outputs/cache/tokenized",
) -> ConversationDataset:
    """Render and tokenize conversations, see `deepspec.data.formats` for where they may come from.

    The result is an Arrow file under `cache_dir`, named by a digest of the sources' content, the tokenizer, the
    template, its options, the system prompt and `max_length`: made once, never stale. Longer samples are cut to
    `max_length` tokens; samples with fewer than `min_supervised_tokens` assistant tokens left are dropped; both are
    counted in the log.

    Args:
        template_name: for messages.
        on_bad_row: stop, or skip and count.

    Raises:
        DataError: a source that cannot be read, a bad row (with `stop`), or no sample left.
    """
    template = ChatTemplate(tokenizer, template_options, system_prompt, template_name)
    rows = tokenized_rows(files, template, max_length=max_length, on_bad_row=on_bad_row, cache_dir=cache_dir)
    columns = rows.with_format("numpy")
    supervised = np.asarray(columns["supervised"][:])
    is_sample = np.array([not problem for problem in rows["problem"]], dtype=bool)
    samples = int(is_sample.sum())
    kept = np.flatnonzero((supervised >= min_supervised_tokens) & is_sample)
    if problems := list(filter(None, rows["problem"])):
        logger.warning("%d rows cannot be used and were skipped, the first: %s", len(problems), problems[0])
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


def tokenized_rows(
    files: Sequence[str],
    template: ChatTemplate,
    *,
    max_length: int,
    on_bad_row: str = "stop",
    cache_dir: str = "outputs/cache/tokenized",
) -> datasets.Dataset:
    """All samples with `FEATURES`, and a row with its `problem` for each that is none.

    Raises:
        DataError: a source that cannot be read, or a bad row (with `stop`).
    """
    arguments = {"files": list(files), "template": template, "max_length": max_length, "stops": on_bad_row == "stop"}
    try:
        rows = datasets.Dataset.from_generator(
            _tokenized_rows,
            features=FEATURES,
            cache_dir=cache_dir,
            gen_kwargs=arguments,
            fingerprint=_content_digest(files, template, max_length),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise
    if on_bad_row == "stop" and (problem := next(filter(None, rows["problem"]), "")):
        raise RowError(problem)
    return rows


def _tokenized_rows(files: list[str], template: ChatTemplate, max_length: int, stops: bool) -> Iterator[dict[str, Any]]:
    problems: list[RowError] = []
    conversations = read_conversations(files, on_bad_row=None if stops else problems.append)
    for together in _batched(conversations, TOGETHER):
        named: list[tuple[str, Pieces]] = []
        for conversation in together:
            try:
                samples = write_samples(template, conversation.messages, conversation.tools)
            except ValueError as error:
                problem = RowError(f"{conversation.place}: {error}")
                if stops:
                    raise problem from error
                problems.append(problem)
                continue
            ids = [conversation.id] if len(samples) == 1 else [f"{conversation.id} {n}" for n in range(len(samples))]
            named += zip(ids, samples, strict=True)
        for (name, _), rendered in zip(named, tokenize(template.tokenizer, [s for _, s in named]), strict=True):
            loss_mask = rendered.loss_mask[:max_length]
            yield {
                "id": name,
                "input_ids": rendered.input_ids[:max_length],
                "loss_mask": loss_mask,
                "truncated": len(rendered.input_ids) > max_length,
                "tokens": len(loss_mask),
                "supervised": sum(loss_mask),
                "problem": "",
            }
        yield from _problem_rows(problems)
    yield from _problem_rows(problems)


def _batched(conversations: Iterator[Conversation], count: int) -> Iterator[list[Conversation]]:
    while together := list(islice(conversations, count)):
        yield together


def _problem_rows(problems: list[RowError]) -> Iterator[dict[str, Any]]:
    """Rows that are no samples; empties the list."""
    nothing = {"input_ids": [], "loss_mask": [], "truncated": False, "tokens": 0, "supervised": 0}
    for problem in problems:
        yield {"id": "", **nothing, "problem": mend(str(problem))}
    problems.clear()


def _content_digest(files: Sequence[str], template: ChatTemplate, max_length: int) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(source_digest(file).encode())
    settings = [
        RENDERING,
        sorted(FEATURES),
        template.tokenizer.chat_template,
        sorted(template.tokenizer.get_vocab().items()),
        template.options,
        template.system_prompt,
        max_length,
        list(files),
    ]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]

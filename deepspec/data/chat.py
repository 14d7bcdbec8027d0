"""Chat conversations to token ids and loss mask. The one place where the project renders.

Training, regeneration and evaluation all render here, so a system prompt or a template switch can never be present in
one of them and absent in another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from deepspec.data.conversation import Message
from deepspec.data.samples import Sample, write_samples
from deepspec.data.surrogates import mend
from deepspec.data.templates import ChatTemplate, Tools


@dataclass(frozen=True)
class Rendered:
    """Token ids of one sample and, for each, whether it was written by the assistant (1) or given (0)."""

    input_ids: list[int]
    loss_mask: list[int]


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_options: Mapping[str, Any] | None = None,
    *,
    tools: Tools = None,
    system_prompt: str | None = None,
) -> list[int]:
    """Render the turns so far, followed by the opening of the assistant's next turn. Returns token ids.

    Args:
        tools: functions that the assistant may call.
        system_prompt: goes first where the messages have no system message.

    Raises:
        TemplateError: the template refuses them.
    """
    template = ChatTemplate(tokenizer, template_options, system_prompt)
    readable = template.readable(template.with_system_prompt(messages), tools)
    text = template.text(readable, tools, is_prompt=True)
    return tokenize(tokenizer, [[(text, False)]])[0].input_ids


def render_samples(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_options: Mapping[str, Any] | None = None,
    *,
    tools: Tools = None,
    system_prompt: str | None = None,
) -> list[Rendered]:
    """Render a conversation for training, see `write_samples`.

    Raises:
        TemplateError, ValueError: see there.
    """
    template = ChatTemplate(tokenizer, template_options, system_prompt)
    return tokenize(tokenizer, write_samples(template, messages, tools))


def render_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_options: Mapping[str, Any] | None = None,
    *,
    tools: Tools = None,
    system_prompt: str | None = None,
) -> Rendered:
    """The same where one sample is wanted: a template that rewrites earlier turns gives the one of the last turn."""
    return render_samples(tokenizer, messages, template_options, tools=tools, system_prompt=system_prompt)[-1]


def tokenize(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> list[Rendered]:
    """Token ids and loss mask of samples.

    No token holds text of two pieces: where the target writes an answer, the prompt is tokenized by then.
    """
    pieces = [[(mend(text), written) for text, written in sample if text] for sample in samples]
    if not tokenizer.is_fast:
        return [_tokenized_apart(tokenizer, sample) for sample in pieces]
    texts = ["".join(text for text, _ in sample) for sample in pieces]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    rendered = []
    for sample, encoding in zip(pieces, encoded.encodings or [], strict=True):
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        first, last = offsets[:, 0], offsets[:, 1]
        ends = np.cumsum([len(text) for text, _ in sample])
        place = np.where(last > first, first, np.maximum(first - 1, 0))  # spaces may have been trimmed from an offset
        of_token = np.searchsorted(ends, place, side="right").clip(max=len(sample) - 1)
        if _straddles(ends[:-1], first, last, sample):
            rendered.append(_tokenized_apart(tokenizer, sample))
        else:
            written = np.array([written for _, written in sample], dtype=np.int64)
            rendered.append(Rendered(encoding.ids, written[of_token].tolist()))
    return rendered


def _straddles(borders: np.ndarray, first: np.ndarray, last: np.ndarray, sample: Sample) -> bool:
    """Whether a token holds text of two pieces. Offsets may leave out a token's spaces."""
    for number, border in enumerate(borders.tolist()):
        index = int(np.searchsorted(last, border, side="right"))  # the first token that ends behind the border
        if index < len(first) and first[index] < border:
            return True
        reached = int(last[index - 1]) if index else 0
        if reached < border and sample[number][0][-1] == " ":
            return True
    return False


def _tokenized_apart(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Rendered:
    ids, mask = [], []
    for text, written in sample:
        of_piece = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += of_piece
        mask += [int(written)] * len(of_piece)
    return Rendered(ids, mask)

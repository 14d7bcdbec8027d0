"""Chat conversations to token ids and loss mask. The one place where the project renders.

Training, regeneration and evaluation all render here, so a system prompt or a template switch can never be present in
one of them and absent in another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
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
    """Token ids and loss mask of samples, see `encode`."""
    return [Rendered(ids.tolist(), mask.tolist()) for ids, mask in encode(tokenizer, samples)]


def encode(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids [tokens] and loss mask [tokens] of every sample.

    No token holds text of two pieces: where the target writes an answer, the prompt is tokenized by then.
    """
    pieces = [[(mend(text), written) for text, written in sample if text] for sample in samples]
    if not tokenizer.is_fast:
        return [_encoded_apart(tokenizer, sample) for sample in pieces]
    texts = ["".join(text for text, _ in sample) for sample in pieces]
    encodings = tokenizer(texts, add_special_tokens=False, verbose=False).encodings if texts else []
    splits = not _adds_space(tokenizer)
    encoded = []
    for text, sample, encoding in zip(texts, pieces, encodings or [], strict=True):
        borders = np.cumsum([len(piece) for piece, _ in sample]).tolist()[:-1]
        starts = [_first_token(encoding, text, border) for border in borders]
        if splits and any(_straddles(encoding, text, *pair) for pair in zip(borders, starts, strict=True)):
            encoded.append(_encoded_apart(tokenizer, sample))
        else:
            counts = np.diff([0, *starts, len(encoding)])
            encoded.append((np.array(encoding.ids), np.repeat([int(written) for _, written in sample], counts)))
    return encoded


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text alone gets a space in front, as by SentencePiece: then pieces cannot be tokenized apart, and a
    token that holds the space before an answer counts as the answer's."""
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    return str(tokenizer.convert_ids_to_tokens(ids)[0]).startswith(("\u2581", "\u0120"))


def _first_token(encoding: tokenizers.Encoding, text: str, border: int) -> int:
    """The first token with text behind a place.

    The offsets of a token may leave out its leading spaces; those of a token of spaces alone are then empty.
    """
    inside = (encoding.char_to_token(place) for place in range(border, len(text)))
    token = next((found for found in inside if found is not None), len(encoding))
    while token > 0 and border < _span(encoding, token - 1)[0] == _span(encoding, token - 1)[1]:
        token -= 1
    return token


def _straddles(encoding: tokenizers.Encoding, text: str, border: int, token: int) -> bool:
    """Whether the first token behind a border holds text before it, or was cut with a view to what follows."""
    begins_before = token < len(encoding) and _span(encoding, token)[0] < border
    takes_a_space = text[border - 1] == " " and token > 0 and _span(encoding, token - 1)[1] < border
    return begins_before or takes_a_space or text[max(0, border - 2) : border] == "  "


def _span(encoding: tokenizers.Encoding, token: int) -> tuple[int, int]:
    """First character of a token, and the one behind it."""
    return encoding.token_to_chars(token) or (0, 0)


def _encoded_apart(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text, _ in sample]
    flat = [token for of_piece in ids for token in of_piece]
    mask = np.repeat([int(written) for _, written in sample], [len(of_piece) for of_piece in ids])
    return np.array(flat, dtype=np.int64), mask

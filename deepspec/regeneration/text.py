"""Token ids to text without losing a character."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

CONTEXT = 8  # tokens of the prompt that are decoded with an answer, so that its first space is not dropped


def text_behind(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> str:
    """The exact text of tokens behind a prompt. Some tokenizers drop a space that they take for the first of a text."""
    before = all_text(tokenizer, prompt_ids[-CONTEXT:])
    whole = all_text(tokenizer, [*prompt_ids[-CONTEXT:], *output_ids])
    return whole[len(before) :] if whole.startswith(before) else all_text(tokenizer, output_ids)


def all_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Token ids to text, special tokens and every space included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

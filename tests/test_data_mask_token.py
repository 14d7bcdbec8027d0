"""The mask token of tokenizers that have none."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from deepspec.config import ConfigError
from deepspec.data.mask_token import find_mask_token

WORDS = ["<s>", "</s>", "<pad>", "<|user|>", "<|python|>", "<|reserved_special_token_0|>", "a", "b"]


def tokenizer_of(special: list[str], **roles: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="<|user|>{{ messages }}", **roles)


ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.mark.parametrize(
    ("special", "roles", "vocab_size", "expected"),
    [
        (WORDS[:6], ROLES | {"mask_token": "b"}, 20, "b"),
        (WORDS[:6], ROLES, 9, 8),  # a row that no token has
        (WORDS[:6], ROLES, 8, "<|reserved_special_token_0|>"),
        (WORDS[:5], ROLES, 8, "<|python|>"),
        (WORDS[:4], ROLES, 8, "<pad>"),  # <|user|> is in the template
    ],
)
def test_the_first_that_there_is(special: list[str], roles: dict, vocab_size: int, expected: str | int) -> None:
    tokenizer = tokenizer_of(special, **roles)
    wanted = tokenizer.convert_tokens_to_ids(expected) if isinstance(expected, str) else expected
    assert find_mask_token(tokenizer, vocab_size) == wanted


@pytest.mark.parametrize("roles", [{"pad_token": None}, {"pad_token": "</s>"}])
def test_no_token_at_all(roles: dict) -> None:
    tokenizer = tokenizer_of(WORDS[:2] + WORDS[3:4], **(ROLES | roles))
    with pytest.raises(ConfigError, match=r"draft.mask_token_id=null: the tokenizer has neither a mask token nor"):
        find_mask_token(tokenizer, 8)

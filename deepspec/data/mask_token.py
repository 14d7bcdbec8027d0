"""The token that fills the undrafted slots of a block, for tokenizers that have no mask token."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from deepspec.config import ConfigError

# Special tokens that tokenizers hold ready and nobody writes.
RESERVED = re.compile(r"reserved|unused|placeholder|extra|dummy|control|special_?\d", re.IGNORECASE)


def find_mask_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """A token that text hardly ever contains. The draft learns to read it as "not known yet".

    In this order: the tokenizer's mask token; the first id behind the tokenizer's that is still a row of the embedding,
    as in the published drafts of Qwen3; a special token that neither begins, ends nor pads a text and is not in the
    chat template, reserved ones first; the padding token, unless it also ends a text.

    Args:
        vocab_size: rows of the target's embedding.

    Raises:
        ConfigError: there is none.
    """
    ids = tokenizer.get_vocab()
    if tokenizer.mask_token_id is not None and tokenizer.mask_token_id < vocab_size:
        return tokenizer.mask_token_id
    behind = max(ids.values(), default=-1) + 1
    if behind < vocab_size:
        return behind
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    template = str(tokenizer.chat_template or "")
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    free = [id for id, text in sorted(special.items()) if id < vocab_size and id not in named and text not in template]
    reserved = [id for id in free if RESERVED.search(special[id])]
    if reserved or free:
        return (reserved or free)[0]
    pad = tokenizer.pad_token_id
    if pad is not None and pad < vocab_size and pad != tokenizer.eos_token_id:
        return pad
    raise ConfigError(
        "draft.mask_token_id=null: the tokenizer has neither a mask token nor another that text does not contain; give "
        "a token id that never occurs in text"
    )

"""Which tokens a draft with a vocabulary of its own can propose: `draft.vocab_size`."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deepspec.data.dataset import ConversationDataset
from deepspec.drafts.vocabulary import choose_tokens

logger = logging.getLogger(__name__)


def most_used_tokens(
    dataset: ConversationDataset, tokenizer: PreTrainedTokenizerBase, vocab_size: int, size: int
) -> Tensor:
    """The special tokens and those that are most often to be predicted in the data: target ids, long [size], ascending.

    A pure function of data and tokenizer, so all ranks find the same.

    Raises:
        ConfigError: no room for the special tokens.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(id for id, token in added if token.special)}
    counts = dataset.supervised_counts(vocab_size)
    kept = choose_tokens(counts, [id for id in special if id < vocab_size], size)
    logger.info(
        "draft.vocab_size=%d of %d tokens: %.2f %% of what the training data has to predict",
        size,
        vocab_size,
        100 * counts[kept].sum() / counts.sum(),
    )
    return torch.from_numpy(kept)

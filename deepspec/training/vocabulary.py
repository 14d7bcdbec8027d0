"""Which tokens a draft with a vocabulary of its own can propose: `draft.vocab_size`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deepspec.drafts.vocabulary import DraftVocabulary, choose_tokens


def most_used_tokens(counts: np.ndarray, tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """The special tokens and those that are most often to be predicted: target ids, long [size], ascending.

    Args:
        counts: [vocab], see `ConversationDataset.supervised_counts`: the same on all ranks.

    Raises:
        ConfigError: no room for the special tokens.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(id for id, token in added if token.special)}
    return torch.from_numpy(choose_tokens(counts, [id for id in special if id < len(counts)], size))


def describe_vocabulary(draft: DraftVocabulary, counts: np.ndarray) -> str:
    """What a draft with a vocabulary of its own can propose, in a line."""
    known = draft.t2d.cpu().numpy()
    share = counts[known].sum() / max(counts.sum(), 1)
    return (
        f"the draft proposes {known.sum():,} of {len(known):,} tokens, which are {100 * share:.2f} % of what the "
        "training data has to predict"
    )

"""The target's embedding and head inside a draft, kept away from everything that handles parameters."""

from __future__ import annotations

import torch

from deepspec.drafts import DraftModel


def hold_target_weights_as_buffers(draft: DraftModel, dtype: torch.dtype) -> None:
    """Turn the frozen weights of embedding and head into buffers of the same names, in the dtype of the target.

    They came from the target, so its dtype loses nothing; a bf16 head is half as large and makes the products of the
    objective fast on a GPU.

    `state_dict`, `save_pretrained` and `forward` do not notice. ZeRO-3 does: parameters it would cut over the ranks and
    gather in every pass. Of a buffer each rank keeps its own copy, which it got from the target or the checkpoint, and
    nothing sends, gathers or optimizes it.
    """
    for module in (draft.embed_tokens, draft.lm_head):
        weight = module.weight.detach().to(dtype)
        del module.weight
        module.register_buffer("weight", weight)

"""Can this target be decoded in slots? Asked before a draft is trained that nothing could use."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.config import ConfigError
from deepspec.decoding.cache import SlotCache
from deepspec.decoding.passes import target_pass
from deepspec.decoding.span import Span
from deepspec.targets import Target
from deepspec.targets.adapters import TESTED_FAMILIES
from deepspec.targets.probe import as_documents, relative_difference, tolerance

PROMPT, BLOCK, ROWS = 3, 3, 2


@torch.no_grad()
def check_decodable(target: Target) -> None:
    """Refuse a target that the engine could not decode: a family that the tests do not know is tried on a few tokens.

    Raises:
        ConfigError: it cannot; says why.
    """
    if target.config.model_type in TESTED_FAMILIES:
        return
    ids = torch.arange(1, ROWS * (PROMPT + 2 * BLOCK) + 1, device=target.device).view(ROWS, -1) % target.vocab_size
    try:
        expected = target.features(as_documents(ids, ROWS), []).final
        found = _decoded(target, ids)
    except (RuntimeError, IndexError, AttributeError, TypeError, ValueError, NotImplementedError) as error:
        raise _undecodable(target, f"its layers do not work with a cache of slots ({error})") from error
    kept = torch.tensor([PROMPT + 2 * BLOCK, PROMPT + 1 + BLOCK], device=target.device)
    is_kept = torch.arange(ids.shape[1], device=target.device) < kept[:, None]
    difference = relative_difference(found[is_kept], expected[is_kept])
    if not difference <= tolerance(target.dtype):
        raise _undecodable(target, f"after rejected tokens its states differ by {difference:.2g} of their size")


def _decoded(target: Target, ids: Tensor) -> Tensor:
    """Final states [rows, tokens, hidden] by way of the slots: a prompt, then two passes. After the first of these,
    row 0 keeps everything and row 1 a single token, behind which the pass had wrong ones."""
    final = torch.zeros(*ids.shape, target.hidden_size, dtype=target.dtype, device=target.device)
    cache, starts = SlotCache(target, ROWS, ids.shape[1], BLOCK), [PROMPT] * ROWS

    def run(starts: list[int], tokens: Tensor, *, is_certain: bool) -> None:
        count = tokens.shape[1]
        span = Span.of(range(ROWS), starts, [count] * ROWS, target.device)
        states = target_pass(target, None, cache, span, tokens.flatten(), is_certain=is_certain)
        for row, start in enumerate(starts):
            final[row, start : start + count] = states.view(ROWS, count, -1)[row]

    cache.begin(range(ROWS))
    run([0] * ROWS, ids[:, :PROMPT], is_certain=True)
    drafted = ids[:, PROMPT : PROMPT + BLOCK].clone()
    drafted[1, 1:] = ids[1, 0]
    run(starts, drafted, is_certain=False)
    cache.keep({0: BLOCK, 1: 1}, BLOCK)
    starts = [PROMPT + BLOCK, PROMPT + 1]
    run(starts, torch.stack([ids[row, start : start + BLOCK] for row, start in enumerate(starts)]), is_certain=False)
    return final


def _undecodable(target: Target, why: str) -> ConfigError:
    return ConfigError(
        f"target.path={target.name_or_path}: model type '{target.config.model_type}' cannot be decoded here: {why}; a "
        "draft of it could not be used"
    )

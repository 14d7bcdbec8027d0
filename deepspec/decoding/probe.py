"""Can this target be decoded in slots? Asked before a draft is trained that nothing could use."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.config import ConfigError
from deepspec.data.packing import Document, TokenBatch
from deepspec.decoding.cache import SlotCache
from deepspec.decoding.passes import target_pass
from deepspec.decoding.span import Span
from deepspec.targets import Target
from deepspec.targets.adapters import TESTED_FAMILIES

PROMPT, BLOCK, ROWS = 3, 3, 2
TOLERANCE = 100  # rounding errors of the target's dtype


@torch.no_grad()
def check_decodable(target: Target) -> None:
    """Refuse a target that the engine could not decode. A family that the tests do not know is tried on a few tokens.

    Raises:
        ConfigError: it cannot; says why.
    """
    _ = target.memory  # refuses layers that remember in a way the engine has no cache for
    if target.config.model_type in TESTED_FAMILIES:
        return
    ids = torch.arange(1, ROWS * (PROMPT + 2 * BLOCK) + 1, device=target.device).view(ROWS, -1) % target.vocab_size
    expected = target.features(_documents(ids), []).final
    try:
        found = _decoded(target, ids)
    except (RuntimeError, IndexError, AttributeError, TypeError, ValueError, NotImplementedError) as error:
        raise _undecodable(target, f"its layers do not work with a cache of slots ({error})") from error
    kept = torch.tensor([PROMPT + 2 * BLOCK, PROMPT + 1 + BLOCK], device=target.device)
    is_kept = torch.arange(ids.shape[1], device=target.device) < kept[:, None]
    difference = float((found - expected)[is_kept].float().abs().max())
    limit = TOLERANCE * torch.finfo(target.dtype).eps * max(1.0, float(expected.float().abs().max()))
    if not difference <= limit:
        raise _undecodable(target, f"after rejected tokens its states differ by {difference:.2g} from plain ones")


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


def _documents(ids: Tensor) -> TokenBatch:
    rows, length = ids.shape
    documents = tuple(Document(row, row, 0, length) for row in range(rows))
    positions = torch.arange(length, device=ids.device).expand(rows, -1)
    return TokenBatch(ids, positions, torch.ones_like(ids, dtype=torch.bool), documents)


def _undecodable(target: Target, why: str) -> ConfigError:
    return ConfigError(
        f"target.path={target.name_or_path}: model type '{target.config.model_type}' cannot be decoded here: {why}; a "
        "draft of it could not be used"
    )

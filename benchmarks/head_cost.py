"""What the sequential and the confidence head add to a round."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.summary import summary
from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine
from deepspec.drafts import DSparkModel
from deepspec.targets import Target

WARM_UP = 3  # rounds


def head_share(
    target: Target, draft: DSparkModel, requests: Sequence[Request], batch: int, repeats: int, rounds: int = 12
) -> dict[str, float]:
    """Time of a round over that of one of the same draft without the heads, minus 1.

    Both engines keep the same rows from beginning to end and take turns round by round.

    Args:
        requests: repeated to fill the batch.
        repeats: figures, each over so many rounds.
    """
    headless = copy.copy(draft)
    headless._modules = draft._modules | {"markov_head": None, "confidence_head": None}
    tokens = (WARM_UP + repeats * rounds + 1) * (draft.draft_length + 1)
    rows = [
        replace(requests[row % len(requests)], max_new_tokens=tokens, stop_token_ids=(), seed=row)
        for row in range(batch)
    ]
    positions = max(len(row.prompt_ids) for row in rows) + tokens + draft.draft_length
    engines = [
        SpeculativeEngine(target, DSparkProposer(made, target), slots=batch, max_length=positions)
        for made in (draft, headless)
    ]
    for engine in engines:
        for row in rows:
            engine.submit(row)
        for _ in range(1 + WARM_UP):  # the prompts first
            engine.step()
    shares = []
    for _ in range(repeats):
        seconds = [0.0, 0.0]
        for turn in range(rounds):
            for which in (turn % 2, 1 - turn % 2):
                started = time.perf_counter()
                engines[which].step()
                seconds[which] += time.perf_counter() - started
        shares.append(seconds[0] / seconds[1] - 1)
    return summary(shares)

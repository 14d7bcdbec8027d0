"""How many steps, and the learning rate of each: pure functions, so a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from deepspec.config import TrainConfig


def total_steps(train: TrainConfig, num_samples: int) -> int:
    """Optimizer steps of the whole run: `train.steps`, or `train.epochs` passes over the samples, rounded up."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None  # `validate` asks for one of them
    return max(1, math.ceil(round(train.epochs * num_samples / train.global_batch_size, 6)))


def learning_rate(step: int, *, peak: float, warmup_ratio: float, steps: int) -> float:
    """Linear warmup to exactly `peak`, then cosine to 0 at the end of the run; never above `peak`.

    Args:
        step: optimizer steps done before this one.
        peak: the highest learning rate.
        warmup_ratio: fraction of `steps` spent warming up; the last warmup step has the peak.
        steps: optimizer steps of the whole run.
    """
    warmup = round(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

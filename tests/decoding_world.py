"""What the decoding tests share: tiny targets and drafts, exact probabilities, and a G-test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from conftest import tiny_draft_config, tiny_target_config
from scipy.stats import power_divergence
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deepspec.decoding import LookupProposer, Proposal
from deepspec.drafts import DSparkModel, build_draft
from deepspec.targets import Target


def random_target(family: str = "qwen3", *, seed: int = 0, scale: float = 0.4, **changes) -> Target:
    """An untrained target whose output depends sharply on every token it reads."""
    config = tiny_target_config(family, initializer_range=scale, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Target(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), f"random {family}")


def random_draft(target: Target, *, seed: int = 1, scale: float = 0.3, **changes) -> DSparkModel:
    """An untrained draft of that target in which no weight is zero or one, so that nothing hides."""
    draft = build_draft(tiny_draft_config(target.config, **changes), target, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in draft.trainable_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else scale * noise)
    return draft


def generated(target, prompt: list[int], new_tokens: int, **options) -> list[int]:
    """What `generate` of Transformers says greedily."""
    ids = torch.tensor([prompt])
    output = target.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return output[0, len(prompt) :].tolist()


class Replay(LookupProposer):
    """A proposer of greedy rows that knows what they will say, but gets every `wrong_every`-th position wrong."""

    has_confidences = False

    def __init__(self, prompts: Sequence[list[int]], outputs: Sequence[list[int]], block_size: int, wrong_every: int):
        super().__init__(block_size)
        self._following: dict[tuple[int, ...], list[int]] = {}
        for prompt, output in zip(prompts, outputs, strict=True):
            for i in range(len(output)):
                wrong = [
                    (following + 1) % 7 if (i + j + 1) % wrong_every == 0 else following
                    for j, following in enumerate(output[i + 1 : i + 1 + block_size])
                ]
                self._following[*prompt, *output[: i + 1]] = wrong + [0] * (block_size - len(wrong))

    def propose(self, anchors: Tensor, positions: Tensor, *args: Any) -> Proposal:
        length = args[-1] if args else self.block_size
        unknown = [0] * self.block_size  # of a row that is not among the requests
        tokens = [
            self._following.get((*self._tokens[row, :position].tolist(), anchor), unknown)[:length]
            for row, (position, anchor) in enumerate(zip(positions.tolist(), anchors.tolist(), strict=True))
        ]
        return Proposal(torch.tensor(tokens), None, None)


def warped(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    prefixes: Tensor | None = None,
) -> Tensor:
    """Float64 probabilities after the processors of `generate` of Transformers: [rows, vocab] -> same shape.

    `prefixes` [rows, tokens] is what the repetition penalty looks at.
    """
    processors = LogitsProcessorList()
    if repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    read = torch.zeros(len(logits), 1, dtype=torch.long) if prefixes is None else prefixes
    return torch.softmax(processors(read, logits.double()), dim=-1)


def g_test(outcomes: Tensor | Sequence[int], probabilities: Tensor) -> float:
    """The p-value of observed outcomes (indices into `probabilities`, flattened) under exact probabilities.

    Cells that expect fewer than 5 are pooled. An outcome of probability 0 is impossible: p-value 0.
    """
    expected = probabilities.double().flatten().numpy()
    counts = np.bincount(np.asarray(outcomes).ravel(), minlength=len(expected)).astype(float)
    if counts[expected == 0].any():
        return 0.0
    expected = expected / expected.sum() * counts.sum()
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    possible = expected > 0
    return float(power_divergence(counts[possible], expected[possible], lambda_="log-likelihood").pvalue)

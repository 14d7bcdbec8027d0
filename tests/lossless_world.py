"""What the tests of losslessness share: a tiny pair of models, exact ancestral sampling, policies that vary lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from decoding_world import g_test, random_draft, random_target, warped
from torch import Tensor

from deepspec.decoding import Completion, DSparkProposer, Proposal, Proposer, Request, SpeculativeEngine
from deepspec.decoding.policies import ConfidenceThreshold, Policy, PolicySetup, build_policy
from deepspec.decoding.sps import SpsTable
from deepspec.drafts import DSparkModel
from deepspec.targets import Target

VOCAB, BLOCK, TOKENS = 6, 2, 4  # the first token comes from the prefill pass, the others from rounds
PROMPT = [1, 5, 2]
REQUESTS, SLOTS = 4_000, 400
ACCEPTABLE, REJECTED = 1e-4, 1e-5  # p-values; seeded, so a verdict never flickers

# Passes of all slots: a token more costs as much as a 400th of what any pass costs.
GENTLE = SpsTable([1, SLOTS * (1 + BLOCK)], [1 / (SLOTS + 1), 1 / (SLOTS * (2 + BLOCK))])
# Passes of two slots: the first two drafted tokens are dear, the others nearly free.
CLIFF = SpsTable([2, 3, 4, 5, 6], [1 / 1.0, 1 / 1.3, 1 / 1.6, 1 / 1.65, 1 / 1.7])


@cache
def tiny_target() -> Target:
    return random_target(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        scale=0.3,
        seed=1,
    )


@cache
def tiny_draft(**changes: Any) -> DSparkModel:
    """Untrained, so a poor guesser."""
    settings = {"num_layers": 1, "block_size": BLOCK, "target_layer_ids": (0, 1), "mask_token_id": 0, "markov_rank": 4}
    return random_draft(tiny_target(), **(settings | changes), seed=1, scale=0.5)


class Opinionated(DSparkProposer):
    """Confident after the tokens 0, 1 and 2, whether it is right or not; what else a token is does not matter."""

    has_confidences = True

    def propose(self, anchors: Tensor, *args: Any) -> Proposal:
        proposal = super().propose(anchors, *args)
        previous = torch.cat([anchors[:, None], proposal.tokens[:, :-1]], dim=1)
        confidences = torch.where(previous < 3, torch.tensor([0.8, 0.95]), torch.tensor([0.58, 0.05]))
        return replace(proposal, confidences=confidences)


def engine_of(proposer: Proposer | None = None, **options: Any) -> SpeculativeEngine:
    settings = {"slots": SLOTS, "max_length": len(PROMPT) + TOKENS + BLOCK}
    proposer = proposer or DSparkProposer(tiny_draft(), tiny_target())
    return SpeculativeEngine(tiny_target(), proposer, **(settings | options))


def engine_with(policy: str, **options: Any) -> SpeculativeEngine:
    """With a policy of `POLICIES`."""
    draft = Opinionated if policy.endswith("_in_pairs") else DSparkProposer
    return engine_of(draft(tiny_draft(), tiny_target()), policy=POLICIES[policy](), **options)


@cache
def median_confidence() -> float:
    """A threshold that cuts about half of the proposals short."""
    completions = engine_of().generate([Request(PROMPT, TOKENS, 1.0, seed=seed) for seed in range(SLOTS)])
    confidences = [c for completion in completions for r in completion.rounds for c in r.confidences]
    return float(torch.tensor(confidences).median())


class InPairs(Policy):
    """Slots 0 and 1 as if they were alone, and so on: what one row's confidences do to another is then large."""

    def __init__(self, make: Callable[[], Policy]):
        self._parts = [make() for _ in range(SLOTS // 2)]
        self.maximum = self._parts[0].maximum

    def reset(self) -> None:
        for part in self._parts:
            part.reset()

    def known_total(self, rows: int) -> int | None:
        totals = [part.known_total(min(2, rows - 2 * i)) for i, part in enumerate(self._parts[: -(-rows // 2)])]
        return None if None in totals else sum(totals)

    def lengths(self, confidences: Tensor | None, rows: int) -> Tensor:
        pairs = confidences[:rows].split(2)
        return torch.cat([part.lengths(pair, len(pair)) for part, pair in zip(self._parts, pairs, strict=False)])


def _built(name: str, table: SpsTable, rows: int = SLOTS) -> Policy:
    return build_policy(name, PolicySetup(BLOCK, rows, has_confidences=True, sps=table))


POLICIES: dict[str, Callable[[], Policy]] = {
    "fixed": lambda: build_policy("fixed", PolicySetup(BLOCK, SLOTS, has_confidences=True)),
    "fixed_1": lambda: build_policy("fixed", PolicySetup(BLOCK, SLOTS, has_confidences=True, draft_tokens=1)),
    "threshold": lambda: ConfidenceThreshold(median_confidence(), BLOCK),
    "prefix": lambda: _built("prefix", GENTLE),
    "prefix_in_pairs": lambda: InPairs(lambda: _built("prefix", CLIFF, 2)),
    "asynchronous": lambda: _built("asynchronous", GENTLE),
    "asynchronous_in_pairs": lambda: InPairs(lambda: _built("asynchronous", CLIFF, 2)),
}


def exact(sampling: dict[str, Any], target: Target) -> list[Tensor]:
    """Joint probabilities of the first one, two, ... tokens, from uncached forward passes of Transformers."""
    prefixes, joint, joints = torch.tensor([PROMPT]), torch.ones(1, dtype=torch.float64), []
    for _ in range(TOKENS):
        with torch.inference_mode():
            logits = target.model(prefixes, use_cache=False).logits[:, -1]
        joint = (joint[:, None] * warped(logits, **sampling, prefixes=prefixes)).flatten()
        joints.append(joint)
        following = torch.arange(VOCAB).repeat(len(prefixes))[:, None]
        prefixes = torch.cat([prefixes.repeat_interleave(VOCAB, 0), following], dim=1)
    return joints


def sampled(engine: SpeculativeEngine, sampling: dict[str, Any]) -> list[Completion]:
    return engine.generate([Request(PROMPT, TOKENS, **sampling, seed=seed) for seed in range(REQUESTS)])


def p_values(completions: Sequence[Completion], sampling: dict[str, Any], target: Target | None = None) -> list[float]:
    """Of the joint distributions of the first one, two, ... tokens, and of each token alone."""
    rounds = [r for completion in completions for r in completion.rounds]
    assert any(r.accepted for r in rounds)
    assert any(r.accepted < r.proposed for r in rounds)
    outcomes = torch.tensor([completion.output_ids for completion in completions])
    code, values = torch.zeros(len(outcomes), dtype=torch.long), []
    for position, joint in enumerate(exact(sampling, target or tiny_target())):
        code = code * VOCAB + outcomes[:, position]
        values.append(g_test(code, joint))
        values.append(g_test(outcomes[:, position], joint.view(-1, VOCAB).sum(0)))
    return values

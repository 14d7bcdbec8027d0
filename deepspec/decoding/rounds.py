"""What a round computes: a proposal for every row, one target pass over what the policy picks, the verdict."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from deepspec.decoding.cache import SlotCache
from deepspec.decoding.graphs import Graphs, Tensors, ladder, next_size
from deepspec.decoding.passes import target_pass
from deepspec.decoding.policies import Policy
from deepspec.decoding.proposers import Proposal, Proposer
from deepspec.decoding.sampling import SamplingSettings, draw_token, probabilities
from deepspec.decoding.span import Span
from deepspec.decoding.verification import VERIFICATION_RULES, Verdict, verify_greedy
from deepspec.kernels.dispatch import runs_in_triton
from deepspec.kernels.rejection import verify_logits
from deepspec.targets import Target


@dataclass(frozen=True)
class Batch:
    """The rows of a round, in the first slots."""

    rows: int  # with a request; for a graph there may be idle ones behind them
    starts: list[int]  # each row's anchor position
    anchors: Tensor  # long [rows]
    lengths: Tensor  # long [rows], as `starts`
    uniform: Tensor | None  # float64 [rows, 2 * block_size + 1]: to draft, to accept, for the next token
    settings: SamplingSettings
    end: int  # columns of the caches that this round may touch

    @property
    def inputs(self) -> Tensors:
        """What changes from round to round."""
        return (self.anchors, self.lengths, self.uniform, *self.settings.tensors)

    @property
    def key(self) -> tuple[Hashable, ...]:
        """What a graph of this batch depends on."""
        return (len(self.starts), self.end, *self.settings.flags)


class PassSize(NamedTuple):
    """Of a verify pass."""

    total: int  # tokens, or more: see `Span`
    longest: int  # of the tokens of a row


@dataclass(frozen=True)
class Outcome:
    """Per row, what a round has found."""

    proposal: Proposal | None
    proposed: Tensor  # long [rows], how many drafted tokens were verified
    finite: Tensor  # bool [rows, 1]
    verdict: Verdict
    longest: int  # tokens of a row in the pass
    is_certain: bool  # all of them are kept, see `target_pass`


class Rounds:
    """Runs rounds, through graphs if there are some."""

    def __init__(
        self,
        target: Target,
        proposer: Proposer | None,
        cache: SlotCache,
        policy: Policy,
        rule: str,
        graphs: Graphs | None,
    ):
        self.target, self.proposer, self.cache = target, proposer, cache
        self.policy, self.rule, self.graphs = policy, rule, graphs
        self.block_size = proposer.block_size if proposer else 0

    def draft(self, batch: Batch) -> Proposal | None:
        """A proposal for every row; None where nothing is proposed."""
        proposer = self.proposer
        length = min(self.policy.to_draft(batch.rows), self.block_size)
        if proposer is None or length == 0:
            return None
        columns = batch.end if self.graphs else max(batch.starts)

        def propose(anchors: Tensor, lengths: Tensor, uniform: Tensor | None, *settings: Tensor) -> Tensors:
            made = proposer.propose(anchors, lengths, columns, batch.settings.with_tensors(settings), uniform, length)
            return made.tokens, made.probabilities, made.confidences

        tokens, distribution, confidences = self._run(batch, ("draft", length), propose, batch.inputs)
        assert tokens is not None
        return Proposal(tokens, distribution, confidences)

    def verify(self, batch: Batch, proposal: Proposal | None) -> Outcome:
        """One target pass over the anchors and as many drafted tokens as the policy says."""
        proposed, size = self._pass_size(batch, proposal)
        # A graph is run once more to capture it, and a state that moves on in place would move twice.
        is_certain = size.longest == 1 and self.graphs is None

        def judged(
            anchors: Tensor, lengths: Tensor, uniform: Tensor | None, proposed: Tensor | None, *settings: Tensor
        ) -> Tensors:
            counts: Tensor | int = size.longest if proposed is None else 1 + proposed
            span = Span(range(len(lengths)), lengths, counts, total=size.total, longest=size.longest, end=batch.end)
            if len(lengths) == 1 and not self.graphs:
                span.start = batch.starts[0]
            ids = anchors[:, None]
            if proposal is not None:
                ids = torch.cat([ids, proposal.tokens[:, : size.longest - 1]], dim=1)
            final = target_pass(
                self.target, self.proposer, self.cache, span, span.to_packed(ids), is_certain=is_certain
            )
            logits = span.to_rows(self.target.logits(final))
            return self._judge(proposal, proposed, ids, logits, batch.settings.with_tensors(settings), uniform)

        anchors, lengths, uniform, *settings = batch.inputs
        inputs = (anchors, lengths, uniform, proposed, *settings)
        key = ("verify", size, proposed is None, proposal is None)
        finite, accepted, next_token = self._run(batch, key, judged, inputs)
        assert finite is not None
        assert accepted is not None
        assert next_token is not None
        if proposed is None:
            proposed = torch.full_like(accepted, size.longest - 1)
        return Outcome(proposal, proposed, finite, Verdict(accepted, next_token), size.longest, is_certain)

    def _pass_size(self, batch: Batch, proposal: Proposal | None) -> tuple[Tensor | None, PassSize]:
        """How many drafted tokens of each row to verify, None = the same number of each, and the size of that pass.

        The host waits for the device only if the policy must see this round's confidences to know the total.
        """
        rows = len(batch.starts)
        if proposal is None:
            return None, PassSize(rows, 1)
        drafted, confidences = proposal.tokens.shape[1], proposal.confidences
        total = self.policy.known_total(batch.rows)
        proposed = self.policy.lengths(None if confidences is None else confidences[: batch.rows], batch.rows)
        if total == batch.rows * drafted:
            return None, PassSize(rows * (1 + drafted), 1 + drafted)
        if total is None:
            total = int(proposed.sum())
        tokens, longest = rows + total, 1 + min(drafted, total)
        if self.graphs:
            proposed = functional.pad(proposed, (0, rows - batch.rows))
            tokens, longest = next_size(tokens, ladder(rows * (1 + drafted))), 1 + drafted
        return proposed, PassSize(tokens, longest)

    def _judge(
        self,
        proposal: Proposal | None,
        proposed: Tensor | None,
        ids: Tensor,
        logits: Tensor,
        settings: SamplingSettings,
        uniform: Tensor | None,
    ) -> Tensors:
        """What is kept, by the target's logits [rows, longest, vocab] behind the tokens of `ids` [rows, longest].

        Returns:
            `finite` of an `Outcome`, and the fields of its verdict.
        """
        finite = all_finite(logits)
        if settings.penalty:
            logits = settings.penalty.apply_along(logits, ids)
        verdict = self._verdict(proposal, proposed, logits, settings, uniform)
        if proposal is not None and proposal.probabilities is not None:
            finite = finite & all_finite(proposal.probabilities)
        if settings.penalty:
            settings.penalty.keep(ids, verdict.accepted, verdict.next_token)
        return finite, verdict.accepted, verdict.next_token

    def _verdict(
        self,
        proposal: Proposal | None,
        proposed: Tensor | None,
        logits: Tensor,
        settings: SamplingSettings,
        uniform: Tensor | None,
    ) -> Verdict:
        drafted = logits.shape[1] - 1
        if proposal is None or drafted == 0:
            token = draw_token(logits[:, 0], settings, None if uniform is None else uniform[:, -1])
            return Verdict(torch.zeros_like(token), token)
        tokens = proposal.tokens[:, :drafted]
        if uniform is None:
            return verify_greedy(tokens, logits.argmax(-1), proposed)
        accept_uniform = uniform[:, self.block_size : self.block_size + drafted]
        if proposal.probabilities is None:
            distribution = functional.one_hot(tokens, logits.shape[-1]).float()
        else:
            distribution = proposal.probabilities[:, :drafted]
        next_uniform = uniform[:, -1]
        if settings.is_plain and runs_in_triton(logits, None):
            packed, temperatures = logits.flatten(0, 1), settings.temperatures
            return verify_logits(
                self.rule, tokens, distribution, packed, temperatures, proposed, accept_uniform, next_uniform
            )
        target = probabilities(logits, settings)
        return VERIFICATION_RULES[self.rule](tokens, distribution, target, proposed, accept_uniform, next_uniform)

    def _run(
        self, batch: Batch, key: tuple[Hashable, ...], function: Callable[..., Tensors], inputs: Tensors
    ) -> Tensors:
        """Through a graph, unless there are none or the warm-up would change the tables of a penalty."""
        if self.graphs is None or batch.settings.penalty:
            return function(*inputs)
        return self.graphs.run((*key, *batch.key), function, inputs)


def all_finite(values: Tensor) -> Tensor:
    """Whether each row has a largest value at every position: [rows, tokens, vocab] -> bool [rows, 1]"""
    return values.amax(-1).isfinite().all(1, keepdim=True)

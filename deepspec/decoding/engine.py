"""The speculative decoder: batched, slot-based, lossless (DSpark section 5).

A fixed number of slots with preallocated caches; requests enter and leave at any round; each row accepts its own number
of tokens. A round drafts up to block_size tokens per row, verifies anchor and draft in one target pass, and keeps what
the verification rule keeps. Without a proposer the same engine decodes plainly: it verifies nothing and draws one token.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspec.decoding.cache import SlotCache
from deepspec.decoding.proposers import Proposal, Proposer
from deepspec.decoding.requests import Completion, Request, Round
from deepspec.decoding.sampling import SamplingSettings, UniformStream, probabilities, sample
from deepspec.decoding.verification import VERIFICATION_RULES
from deepspec.targets import Target


@dataclass
class Timing:
    """Wall seconds spent in each part of a `generate` call."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0


@dataclass
class _Row:
    """An active request. Its anchor is its last token, at position `length`; everything before it is in the caches."""

    index: int
    request: Request
    stream: UniformStream
    completion: Completion
    anchor: int
    length: int


class SpeculativeEngine:
    """Decodes requests with a target and, optionally, a proposer."""

    def __init__(
        self,
        target: Target,
        proposer: Proposer | None = None,
        *,
        slots: int = 1,
        max_length: int,
        confidence_threshold: float = 0.0,
        verification: str = "token",
    ):
        """
        Args:
            slots: requests decoded together.
            max_length: positions per slot; a request needs prompt + max_new_tokens + block_size of them.
            confidence_threshold: propose only up to the first token whose confidence is below; 0 = always block_size.
            verification: token or block.

        Raises:
            ValueError: the target has layers without full attention, or a threshold is set for a draft without
                confidence head (found at the first round).
        """
        unsupported = set(getattr(target.config, "layer_types", None) or []) - {"full_attention"}
        if unsupported:
            raise ValueError(
                f"target {target.name_or_path}: layers of type {sorted(unsupported)} cannot be decoded yet"
            )
        self.target = target
        self.proposer = proposer
        self.slots = slots
        self.max_length = max_length
        self.confidence_threshold = confidence_threshold
        self.block_size = proposer.block_size if proposer else 0
        self.timing = Timing()
        self._layer_ids = tuple(proposer.layer_ids) if proposer else ()
        self._verify_rule = VERIFICATION_RULES[verification]
        self._cache = SlotCache(target.config, slots, max_length, target.dtype, target.device)
        self._columns = torch.arange(max_length, device=target.device)
        self._offsets = torch.arange(self.block_size + 1, device=target.device)
        if proposer:
            proposer.allocate(slots, max_length)

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], on_finish: Callable[[int, Completion], None] | None = None
    ) -> list[Completion]:
        """Decode all requests; `on_finish(index, completion)` is called as each one ends.

        A request gives the same tokens whatever else is in the batch, up to floating-point rounding.

        Raises:
            ValueError: a request with an empty prompt, or one that does not fit a slot.
        """
        for index, request in enumerate(requests):
            self._check(index, request)
        self.timing = Timing()
        waiting = deque(enumerate(requests))
        active: list[_Row] = []  # active[i] lives in slot i
        completions: dict[int, Completion] = {}
        while waiting or active:
            if waiting and len(active) < self.slots:
                entering = [waiting.popleft() for _ in range(min(len(waiting), self.slots - len(active)))]
                active += self._prefill(entering, first_slot=len(active))
            else:
                self._round(active)
            for slot in range(len(active) - 1, -1, -1):
                row = active[slot]
                if row.completion.finish_reason:
                    completions[row.index] = row.completion
                    if on_finish:
                        on_finish(row.index, row.completion)
                    self._vacate(active, slot)
        return [completions[index] for index in range(len(requests))]

    def _check(self, index: int, request: Request) -> None:
        if not request.prompt_ids:
            raise ValueError(f"request {index}: the prompt is empty")
        needed = len(request.prompt_ids) + request.max_new_tokens + self.block_size
        if needed > self.max_length:
            raise ValueError(
                f"request {index}: a prompt of {len(request.prompt_ids)} tokens, {request.max_new_tokens} new ones and a block "
                f"of {self.block_size} need {needed} positions, a slot has {self.max_length}; raise decode.max_length "
                "or shorten the request"
            )

    def _vacate(self, active: list[_Row], slot: int) -> None:
        """Remove a row; the last one moves into its slot, so that the active slots are always the first ones."""
        last = len(active) - 1
        if slot != last:
            length = active[last].length
            self._cache.store.move(last, slot, length)
            if self.proposer:
                self.proposer.move(last, slot, length)
            active[slot] = active[last]
        active.pop()

    def _prefill(self, entering: list[tuple[int, Request]], first_slot: int) -> list[_Row]:
        """Run the prompts, right-padded, into consecutive slots and draw each first token."""
        started = time.perf_counter()
        device = self.target.device
        prompts = [request.prompt_ids for _, request in entering]
        longest = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        positions = self._columns[:longest].expand(len(prompts), longest)
        causal = self._columns[:longest] <= positions[..., None]
        slots = torch.arange(first_slot, first_slot + len(prompts), device=device)
        self._cache.begin(slots, positions, columns=None)
        features = self.target.forward(ids, positions, causal[:, None], self._cache, self._layer_ids)
        if self.proposer:
            self.proposer.observe(slots, positions, features.context)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        final = features.final[torch.arange(len(prompts), device=device), last]
        streams = [UniformStream(request.seed) for _, request in entering]
        uniform = torch.stack([stream.draw(1) for stream in streams]).to(device)
        settings = self._settings([request for _, request in entering])
        first = sample(probabilities(self.target.logits(final)[:, None], settings)[:, 0], uniform[:, 0]).tolist()
        rows = []
        for (index, request), stream, token in zip(entering, streams, first, strict=True):
            row = _Row(index, request, stream, Completion(), token, len(request.prompt_ids))
            row.completion.output_ids.append(token)
            self._finish_if_done(row, [token])
            rows.append(row)
        self.timing.prefill += time.perf_counter() - started
        return rows

    def _round(self, active: list[_Row]) -> None:
        """Draft, verify in one target pass, keep."""
        started = time.perf_counter()
        device = self.target.device
        anchors = torch.tensor([row.anchor for row in active], device=device)
        lengths = torch.tensor([row.length for row in active], device=device)
        settings = self._settings([row.request for row in active])
        size = self.block_size
        uniform = torch.stack([row.stream.draw(2 * size + 1) for row in active]).to(device)
        proposal = self._propose(anchors, lengths, settings, uniform[:, :size])
        proposed = self._proposed_lengths(proposal, len(active))
        drafted = max(proposed)
        drafted_at = time.perf_counter()

        tokens = proposal.tokens[:, :drafted]
        positions = lengths[:, None] + self._offsets[: drafted + 1]
        columns = max(row.length for row in active) + drafted + 1
        slots = self._columns[: len(active)]
        self._cache.begin(slots, positions, columns)
        mask = self._columns[:columns] <= positions[..., None]
        ids = torch.cat([anchors[:, None], tokens], dim=1)
        features = self.target.forward(ids, positions, mask[:, None], self._cache, self._layer_ids)
        verdict = self._verify_rule(
            tokens,
            proposal.probabilities[:, :drafted],
            probabilities(self.target.logits(features.final), settings),
            torch.tensor(proposed, device=device),
            uniform[:, size : size + drafted],
            uniform[:, -1],
        )
        if self.proposer:
            self.proposer.observe(slots, positions, features.context)
        outcome = torch.cat([verdict.accepted[:, None], verdict.next_token[:, None], tokens], dim=1).tolist()
        confidences = None if proposal.confidences is None else proposal.confidences.tolist()
        for i, (row, (accepted, next_token, *drafts)) in enumerate(zip(active, outcome, strict=True)):
            of_row = None if confidences is None else confidences[i][: proposed[i]]
            self._advance(row, proposed[i], drafts[:accepted], next_token, of_row)
        self.timing.draft += drafted_at - started
        self.timing.verify += time.perf_counter() - drafted_at

    def _propose(self, anchors: Tensor, lengths: Tensor, settings: SamplingSettings, uniform: Tensor) -> Proposal:
        if self.proposer:
            return self.proposer.propose(anchors, lengths, settings, uniform)
        empty = anchors.new_zeros(len(anchors), 0)
        return Proposal(empty, empty.new_zeros(len(anchors), 0, self.target.vocab_size, dtype=torch.float32), None)

    def _proposed_lengths(self, proposal: Proposal, rows: int) -> list[int]:
        """How many drafted tokens of each row to verify: all, or those before the first one of low confidence."""
        if self.confidence_threshold == 0 or not self.proposer:
            return [self.block_size] * rows
        if proposal.confidences is None:
            raise ValueError(
                f"decode.confidence_threshold={self.confidence_threshold}: this draft has no confidence head; "
                "train one with draft.confidence_head=true or set 0"
            )
        return (proposal.confidences >= self.confidence_threshold).long().cumprod(1).sum(1).tolist()

    def _advance(
        self, row: _Row, proposed: int, kept: list[int], next_token: int, confidences: list[float] | None
    ) -> None:
        """Book one round of one row."""
        stop = next((i + 1 for i, token in enumerate(kept) if token in row.request.stop_token_ids), None)
        if stop is not None:
            kept, proposed = kept[:stop], stop
            new = kept
        else:
            new = [*kept, next_token]
        room = row.request.max_new_tokens - len(row.completion.output_ids)
        confidences = None if confidences is None else confidences[:proposed]
        row.completion.rounds.append(Round(proposed, len(kept), min(len(new), room), confidences))
        row.completion.output_ids += new[:room]
        row.length += len(new)
        row.anchor = new[-1]
        self._finish_if_done(row, new[:room])

    @staticmethod
    def _finish_if_done(row: _Row, new: list[int]) -> None:
        if new[-1] in row.request.stop_token_ids:
            row.completion.finish_reason = "stop"
        elif len(row.completion.output_ids) >= row.request.max_new_tokens:
            row.completion.finish_reason = "length"

    def _settings(self, requests: list[Request]) -> SamplingSettings:
        return SamplingSettings.of_rows(
            [request.temperature for request in requests],
            [request.top_k for request in requests],
            [request.top_p for request in requests],
            self.target.vocab_size,
            self.target.device,
        )

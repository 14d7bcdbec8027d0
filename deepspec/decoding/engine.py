"""The speculative decoder: batched, slot-based, lossless (DSpark section 5).

A fixed number of slots with preallocated caches; requests enter and leave at any round; each row accepts its own
number of tokens. A round drafts up to block_size tokens per row, verifies anchor and draft in one target pass, and
keeps what the verification rule keeps. Without a proposer the engine decodes plainly: one drawn token a round.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deepspec.config import near_match
from deepspec.decoding.attention import SLOTS
from deepspec.decoding.cache import SlotCache, Span
from deepspec.decoding.penalties import seen_in
from deepspec.decoding.proposers import Proposal, Proposer
from deepspec.decoding.requests import Completion, Request, Timing
from deepspec.decoding.rows import Row
from deepspec.decoding.sampling import SamplingSettings, UniformStream, draw, probabilities
from deepspec.decoding.stopping import Decode, StopCondition
from deepspec.decoding.verification import VERIFICATION_RULES, Verdict, verify_greedy
from deepspec.targets import Target, attend_with


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
        decode: Decode | None = None,
    ):
        """
        Args:
            slots: requests decoded together.
            max_length: positions per slot; a request needs prompt + max_new_tokens + block_size of them.
            confidence_threshold: propose only up to the first token whose confidence is below; 0 = always block_size.
            verification: token or block.
            decode: token ids to text, for requests with stop strings.

        Raises:
            ValueError: the target has layers without full attention, there is no such verification rule, or a threshold
                is set for a proposer without confidences.
        """
        _check_settings(target, proposer, slots, confidence_threshold, verification)
        self.target = target
        self.proposer = proposer
        self.slots = slots
        self.max_length = max_length
        self.confidence_threshold = confidence_threshold
        self.decode = decode
        self.block_size = proposer.block_size if proposer else 0
        self.timing = Timing()
        self._layer_ids = tuple(proposer.layer_ids) if proposer else ()
        self._verify = VERIFICATION_RULES[verification]
        self._device = target.device
        self._cache = SlotCache(target.config, slots, max_length, target.dtype, self._device)
        self._columns = torch.arange(max_length, device=self._device)
        self._settings: SamplingSettings | None = None  # of the active rows; None = they have changed
        self._seen: Tensor | None = None  # bool [slots, vocab], of slots with a repetition penalty; None = no such yet
        if proposer:
            proposer.allocate(slots, max_length)

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], on_finish: Callable[[int, Completion], None] | None = None
    ) -> list[Completion]:
        """Decode all requests; `on_finish(index, completion)` is called as each one ends.

        A request gives the same tokens whatever else is in the batch, up to floating-point rounding. One whose logits
        are not finite ends with the finish reason `error`; the others go on.

        Raises:
            ValueError: a request with an empty prompt, with unknown tokens, that does not fit a slot, or with stop
                strings where the engine cannot decode.
        """
        for index, request in enumerate(requests):
            self._check(index, request)
        self.timing = Timing()
        waiting = deque(enumerate(requests))
        rows: list[Row | None] = []  # rows[i] lives in slot i; None = free
        completions: dict[int, Completion] = {}
        with attend_with(self.target.config, SLOTS):
            while waiting or any(rows):
                free = [slot for slot in range(self.slots) if slot >= len(rows) or rows[slot] is None]
                if waiting and free:
                    self._enter(rows, free, waiting)
                else:
                    self._round(self._without_gaps(rows))
                for slot, row in enumerate(rows):
                    if row and row.finished:
                        completions[row.index] = row.completion
                        if on_finish:
                            on_finish(row.index, row.completion)
                        rows[slot] = self._settings = None
        return [completions[index] for index in range(len(requests))]

    def _check(self, index: int, request: Request) -> None:
        prompt = request.prompt_ids
        if not prompt:
            raise ValueError(f"request {index}: the prompt is empty")
        if min(prompt) < 0 or max(prompt) >= self.target.vocab_size:
            raise ValueError(
                f"request {index}: token ids from {min(prompt)} to {max(prompt)}, but target "
                f"{self.target.name_or_path} knows 0 to {self.target.vocab_size - 1}; use the target's own tokenizer"
            )
        if request.stop_strings and self.decode is None:
            raise ValueError(
                f"request {index}: stop_strings need text; make the engine with decode=, the tokenizer's decode"
            )
        needed = len(prompt) + request.max_new_tokens + self.block_size
        if needed > self.max_length:
            raise ValueError(
                f"request {index}: a prompt of {len(prompt)} tokens, {request.max_new_tokens} new ones and a block of "
                f"{self.block_size} need {needed} positions, a slot has {self.max_length}; raise decode.max_length "
                "or shorten the request"
            )

    def _enter(self, rows: list[Row | None], free: list[int], waiting: deque[tuple[int, Request]]) -> None:
        """Run waiting prompts, right-padded, into free slots and draw each first token."""
        started = time.perf_counter()
        slots = free[: len(waiting)]
        entering = [self._new_row(*waiting.popleft()) for _ in slots]
        prompts = [row.request.prompt_ids for row in entering]
        longest = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self._device)
        span = Span(slots, [0] * len(slots), longest, self._device)
        self._cache.begin(span, attend_slots=False)
        features = self.target.forward(
            ids, span.positions, self._may_attend(span.positions, longest), self._cache, self._layer_ids
        )
        if self.proposer:
            self.proposer.observe(span, features.context)
        ends = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=self._device)
        final = features.final.gather(1, ends[..., None].expand(-1, -1, features.final.shape[-1]))
        logits = self.target.logits(final)
        is_penalised = any(row.request.repetition_penalty != 1 for row in entering)
        seen = seen_in(ids, ends + 1, self.target.vocab_size) if is_penalised else None
        settings = self._settings_of(entering, seen)
        uniform = self._uniform(entering, settings)
        penalised = settings.penalty.apply(logits) if settings.penalty else logits
        tokens, _ = draw(penalised, settings, None if uniform is None else uniform[:, -1:])
        if settings.penalty:
            self._remember(slots, settings.penalty.after(tokens).seen)
        for slot, row, (token, finite) in zip(
            slots, entering, torch.cat([tokens, _finite(logits)], dim=1).tolist(), strict=True
        ):
            if slot < len(rows):
                rows[slot] = row
            else:
                rows.append(row)
            if finite:
                row.begin(token)
            else:
                self._fail(slot, row)
        self._settings = None
        self.timing.prefill += time.perf_counter() - started

    def _new_row(self, index: int, request: Request) -> Row:
        stream = UniformStream(request.seed, 2 * self.block_size + 1) if request.temperature > 0 else None
        stop = StopCondition(request.stop_token_ids, request.stop_strings, self.decode)
        return Row(index, request, stream, stop, len(request.prompt_ids))

    def _remember(self, slots: list[int], seen: Tensor) -> None:
        """Store which tokens, bool [rows, vocab], the prompts in these slots hold."""
        if self._seen is None:
            self._seen = torch.zeros(self.slots, self.target.vocab_size, dtype=torch.bool, device=self._device)
        self._seen[slots] = seen

    def _without_gaps(self, rows: list[Row | None]) -> list[Row]:
        """Move the last rows into free slots, so that the active slots are the first ones. Only when nobody waits."""
        for slot in reversed(range(len(rows))):
            if rows[slot] is None:
                last = rows.pop()
                if last is not None:
                    self._cache.store.move(len(rows), slot, last.length)
                    if self.proposer:
                        self.proposer.move(len(rows), slot, last.length)
                    if self._seen is not None:
                        self._seen[slot] = self._seen[len(rows)]
                    rows[slot] = last
        return [row for row in rows if row is not None]

    def _round(self, rows: list[Row]) -> None:
        """Draft, verify in one target pass, keep."""
        started = time.perf_counter()
        if self._settings is None:
            self._settings = self._settings_of(rows, None if self._seen is None else self._seen[: len(rows)])
        settings, size = self._settings, self.block_size
        starts = [row.length for row in rows]
        anchors, lengths = torch.tensor([[row.anchor for row in rows], starts], device=self._device)
        uniform = self._uniform(rows, settings)
        proposal, proposed = None, [0] * len(rows)
        if self.proposer:
            of_draft = None if uniform is None else uniform[:, :size]
            proposal = self.proposer.propose(anchors, lengths, max(starts), settings, of_draft)
            proposed = self._proposed_lengths(proposal, len(rows))
        drafted = max(proposed)
        drafted_at = time.perf_counter()

        ids = anchors[:, None] if proposal is None else torch.cat([anchors[:, None], proposal.tokens[:, :drafted]], 1)
        span = Span(range(len(rows)), starts, drafted + 1, self._device)
        self._cache.begin(span, attend_slots=True)
        features = self.target.forward(
            ids, span.positions, self._may_attend(span.positions, span.columns), self._cache, self._layer_ids
        )
        logits = self.target.logits(features.final)
        finite = _finite(logits)
        if settings.penalty:
            logits = settings.penalty.apply_along(logits, ids)
        if proposal is None or drafted == 0:
            token, _ = draw(logits, settings, None if uniform is None else uniform[:, -1:])
            verdict = Verdict(torch.zeros_like(lengths), token[:, 0])
        else:
            verdict = self._verdict(proposal, proposed, drafted, logits, settings, uniform)
            if proposal.probabilities is not None:
                finite = finite & _finite(proposal.probabilities)
        if settings.penalty:
            settings.penalty.keep(ids, verdict.accepted, verdict.next_token)
        if self.proposer:
            self.proposer.observe(span, features.context)
        outcome = torch.cat([finite, verdict.accepted[:, None], verdict.next_token[:, None], ids[:, 1:]], 1).tolist()
        confidences = None if proposal is None or proposal.confidences is None else proposal.confidences.tolist()
        for slot, (row, (is_finite, accepted, next_token, *drafts)) in enumerate(zip(rows, outcome, strict=True)):
            if is_finite:
                of_row = None if confidences is None else confidences[slot]
                row.advance(proposed[slot], drafts[:accepted], next_token, of_row)
            else:
                self._fail(slot, row)
        self.timing.draft += drafted_at - started
        self.timing.verify += time.perf_counter() - drafted_at
        self.timing.rounds += 1

    def _proposed_lengths(self, proposal: Proposal, rows: int) -> list[int]:
        """How many drafted tokens of each row to verify: all, or those before the first one of low confidence."""
        if self.confidence_threshold == 0:
            return [self.block_size] * rows
        assert proposal.confidences is not None
        return (proposal.confidences >= self.confidence_threshold).cumprod(1).sum(1).tolist()

    def _verdict(
        self,
        proposal: Proposal,
        proposed: list[int],
        drafted: int,
        logits: Tensor,
        settings: SamplingSettings,
        uniform: Tensor | None,
    ) -> Verdict:
        lengths = None if min(proposed) == drafted else torch.tensor(proposed, device=self._device)
        tokens = proposal.tokens[:, :drafted]
        if uniform is None or proposal.probabilities is None:
            return verify_greedy(tokens, logits.argmax(-1), lengths)
        accept_uniform = uniform[:, self.block_size : self.block_size + drafted]
        distribution = proposal.probabilities[:, :drafted]
        return self._verify(
            tokens, distribution, probabilities(logits, settings), lengths, accept_uniform, uniform[:, -1]
        )

    def _fail(self, slot: int, row: Row) -> None:
        row.fail()
        self._cache.store.clear(slot)
        if self.proposer:
            self.proposer.clear(slot)

    def _may_attend(self, positions: Tensor, columns: int) -> Tensor:
        """Column j is visible to position i if j <= i: bool [rows, 1, tokens, columns]."""
        return (self._columns[:columns] <= positions[..., None])[:, None]

    def _uniform(self, rows: list[Row], settings: SamplingSettings) -> Tensor | None:
        """float64 [rows, 2 * block_size + 1]: to draft, to accept, and for the next token; None if all are greedy."""
        if settings.all_greedy:
            return None
        unused = torch.zeros(2 * self.block_size + 1, dtype=torch.float64)
        drawn = [row.uniform() for row in rows]
        return torch.stack([unused if u is None else u for u in drawn]).to(self._device)

    def _settings_of(self, rows: list[Row], seen: Tensor | None) -> SamplingSettings:
        requests = [row.request for row in rows]
        return SamplingSettings.of_requests(requests, self.target.vocab_size, self._device, seen)


def _finite(values: Tensor) -> Tensor:
    """Whether each row has a largest value at every position: bool [rows, 1]."""
    return values.amax(-1).isfinite().all(1, keepdim=True)


def _check_settings(
    target: Target, proposer: Proposer | None, slots: int, confidence_threshold: float, verification: str
) -> None:
    unsupported = set(getattr(target.config, "layer_types", None) or []) - {"full_attention"}
    if unsupported:
        raise ValueError(f"target {target.name_or_path}: layers of type {sorted(unsupported)} cannot be decoded yet")
    if verification not in VERIFICATION_RULES:
        raise ValueError(
            f"decode.verification={verification}: must be one of {', '.join(VERIFICATION_RULES)}."
            f"{near_match(verification, VERIFICATION_RULES)}"
        )
    if slots < 1:
        raise ValueError(f"decode.batch_size={slots}: must be at least 1")
    if confidence_threshold > 0 and proposer and not proposer.has_confidences:
        raise ValueError(
            f"decode.confidence_threshold={confidence_threshold}: this draft has no confidence head; "
            "train one with draft.confidence_head=true or set 0"
        )

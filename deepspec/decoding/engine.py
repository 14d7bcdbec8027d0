"""The speculative decoder: batched, slot-based, lossless (DSpark section 5).

A fixed number of slots with preallocated caches; requests enter and leave at any round; each row accepts its own
number of tokens. A round drafts a block per row, asks the policy how many of its tokens to verify, runs the target
once over all of them packed in one row, and keeps what the verification rule keeps. Without a proposer the engine
decodes plainly: one drawn token a round.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor

from deepspec.config import ConfigError, near_match
from deepspec.decoding.cache import SlotCache
from deepspec.decoding.graphs import Graphs, cache_columns, ladder, next_size
from deepspec.decoding.memory import check_memory
from deepspec.decoding.passes import target_pass
from deepspec.decoding.penalties import seen_in
from deepspec.decoding.policies import FixedLength, Policy
from deepspec.decoding.probe import check_decodable
from deepspec.decoding.proposers import Proposer
from deepspec.decoding.requests import Completion, Request, Timing
from deepspec.decoding.rounds import Batch, Outcome, Rounds, all_finite
from deepspec.decoding.rows import Row
from deepspec.decoding.sampling import SamplingSettings, UniformStream, draw_token
from deepspec.decoding.span import Span
from deepspec.decoding.stopping import Decode, StopCondition
from deepspec.decoding.verification import VERIFICATION_RULES
from deepspec.targets import Target
from deepspec.targets.positions import check_positions

PREFILL_TOKENS = 16_384  # of the prompts of one pass, each counted as the longest of them: bounds its memory
IDLE = Request([0], 1)  # what a graph's rows without a request do


class SpeculativeEngine:
    """Decodes requests with a target and, optionally, a proposer: all at once (`generate`) or as they come (`step`)."""

    def __init__(
        self,
        target: Target,
        proposer: Proposer | None = None,
        *,
        slots: int = 1,
        max_length: int,
        policy: Policy | None = None,
        verification: str = "token",
        decode: Decode | None = None,
        graphs: bool | None = None,
    ):
        """
        Args:
            slots: requests decoded together.
            max_length: positions per slot; a request needs prompt + max_new_tokens + block_size of them.
            policy: how many drafted tokens to verify; None = the whole block. It serves one engine.
            verification: token or block.
            decode: token ids to text, for requests with stop strings.
            graphs: capture draft and verify passes as CUDA graphs; None = on a GPU.

        Raises:
            ConfigError: the target cannot be decoded, there is no such verification rule, the policy does not fit the
                proposer or the slots, or the caches of so many slots do not fit the memory; says how many do.
        """
        _check_settings(proposer, slots, policy, verification)
        self.target = target
        self.proposer = proposer
        self.slots = slots
        self.max_length = max_length
        self.decode = decode
        self.block_size = proposer.block_size if proposer else 0
        self.policy = policy or FixedLength(self.block_size, target.device)
        self.timing = Timing()
        self._device = target.device
        check_decodable(target)
        check_positions(target.config, max_length - self.block_size, "decode.max_length")
        check_memory(target, proposer, slots, max_length)
        self._cache = SlotCache(target, slots, max_length, self.block_size + 1)
        if proposer:
            proposer.allocate(slots, max_length)
        self._sizes = ladder(slots)
        self._graphs = Graphs(self._device) if (self._device.type == "cuda" if graphs is None else graphs) else None
        self._rounds = Rounds(target, proposer, self._cache, self.policy, verification, self._graphs)
        self._settings: SamplingSettings | None = None  # of the active rows; None = they have changed
        self._seen: Tensor | None = None  # bool [slots, vocab], of slots with a repetition penalty; None = no such yet
        self._rows: list[Row | None] = []  # row i lives in slot i; None = free
        self._waiting: deque[Row] = deque()
        self._submitted = 0

    @property
    def graphs(self) -> Graphs | None:
        """What its passes run through; None = nothing."""
        return self._graphs

    @property
    def active(self) -> int:
        """Requests in slots."""
        return sum(row is not None for row in self._rows)

    @property
    def waiting(self) -> int:
        """Requests without a slot yet."""
        return len(self._waiting)

    @property
    def written(self) -> int:
        """Output tokens of the requests in slots so far."""
        return sum(len(row.completion.output_ids) for row in self._rows if row)

    def generate(
        self, requests: Sequence[Request], on_finish: Callable[[int, Completion], None] | None = None
    ) -> list[Completion]:
        """Decode all requests; `on_finish(index, completion)` is called as each one ends.

        Use either this or `submit` and `step`. A call that is interrupted forgets its requests.

        A request gives the same tokens whatever else is in the batch, up to floating-point rounding. One whose logits
        are not finite ends with the finish reason `error`; the others go on.

        Raises:
            ValueError: requests that were submitted before have not ended, or see `submit`. Nothing is decoded then.
        """
        for index, request in enumerate(requests):
            self._check(index, request)
        if self.active or self.waiting:
            raise ValueError(
                f"{self.active + self.waiting} submitted requests have not ended and `generate` would lose them: call "
                "`step` until none is left, or decode these in another engine"
            )
        self.policy.reset()
        self.timing = Timing()
        first = self._submitted
        for request in requests:
            self.submit(request)
        completions: dict[int, Completion] = {}
        try:
            while self.active or self.waiting:
                for number, completion in self.step():
                    completions[number - first] = completion
                    if on_finish:
                        on_finish(number - first, completion)
        finally:
            self._abandon_all()
        return [completions[index] for index in range(len(requests))]

    def submit(self, request: Request) -> int:
        """Let a request wait for a slot. Returns its number: how many were submitted before.

        Raises:
            ValueError: an empty prompt, unknown tokens, more than a slot holds, or stop strings where the engine
                cannot decode.
        """
        number = self._submitted
        self._check(number, request)
        stream = UniformStream(request.seed, 2 * self.block_size + 1) if request.temperature > 0 else None
        stop = StopCondition(request.stop_token_ids, request.stop_strings, self.decode)
        self._waiting.append(Row(number, request, stream, stop, len(request.prompt_ids)))
        self._submitted += 1
        return number

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Completion]]:
        """Let waiting requests enter free slots, or run one round of those inside. Returns what has ended."""
        free = [slot for slot in range(self.slots) if slot >= len(self._rows) or self._rows[slot] is None]
        if self._waiting and free:
            self._enter(free[: self._can_enter()])
        elif self.active:
            self._round(self._without_gaps())
        ended = []
        for slot, row in enumerate(self._rows):
            if row and row.finished:
                ended.append((row.index, row.completion))
                self._rows[slot] = self._settings = None
        return ended

    def _check(self, number: int, request: Request) -> None:
        prompt = request.prompt_ids
        if not prompt:
            raise ValueError(f"request {number}: the prompt is empty")
        if min(prompt) < 0 or max(prompt) >= self.target.vocab_size:
            raise ValueError(
                f"request {number}: token ids from {min(prompt)} to {max(prompt)}, but target "
                f"{self.target.name_or_path} knows 0 to {self.target.vocab_size - 1}; use the target's own tokenizer"
            )
        if request.stop_strings and self.decode is None:
            raise ValueError(
                f"request {number}: stop_strings need text; make the engine with decode=, the tokenizer's decode"
            )
        needed = len(prompt) + request.max_new_tokens + self.block_size
        if needed > self.max_length:
            raise ValueError(
                f"request {number}: a prompt of {len(prompt)} tokens, {request.max_new_tokens} new ones and a block of "
                f"{self.block_size} need {needed} positions, a slot has {self.max_length}; raise decode.max_length "
                "or shorten the request"
            )

    def _abandon_all(self) -> None:
        """What an interrupted call has left."""
        self._rows, self._settings = [], None
        self._waiting.clear()

    def _can_enter(self) -> int:
        """How many of those that wait can share a pass: one, or as many as PREFILL_TOKENS allow; of a recurrent target
        of equal length, since padding would move their states."""
        first = self._waiting[0].length
        count, longest = 1, first
        for row in islice(self._waiting, 1, self.slots):
            longest = max(longest, row.length)
            if (count + 1) * longest > PREFILL_TOKENS or (self.target.is_recurrent and row.length != first):
                break
            count += 1
        return count

    def _enter(self, slots: list[int]) -> None:
        """Run the prompts of waiting requests, packed, into these slots and draw each first token."""
        started = time.perf_counter()
        entering = [self._waiting.popleft() for _ in slots]
        prompts = [row.request.prompt_ids for row in entering]
        counts = [len(prompt) for prompt in prompts]
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self._device)
        span = Span.of(slots, [0] * len(slots), counts, self._device)
        self._cache.begin(slots)
        final = target_pass(self.target, self.proposer, self._cache, span, ids, is_certain=True)
        logits = self.target.logits(final[torch.tensor(counts, device=self._device).cumsum(0) - 1])[:, None]
        is_penalised = any(row.request.repetition_penalty != 1 for row in entering)
        vocab = self.target.vocab_size
        seen = seen_in(span.to_rows(ids), vocab) if is_penalised else None
        settings = SamplingSettings.of_requests([row.request for row in entering], vocab, self._device, seen)
        uniform = self._uniform(entering, settings)
        penalised = settings.penalty.apply(logits) if settings.penalty else logits
        tokens = draw_token(penalised[:, 0], settings, None if uniform is None else uniform[:, -1])[:, None]
        if settings.penalty:
            self._remember(slots, settings.penalty.after(tokens).seen)
        self._rows += [None] * (max(slots) + 1 - len(self._rows))
        for slot, row, (token, finite) in zip(
            slots, entering, torch.cat([tokens, all_finite(logits)], dim=1).tolist(), strict=True
        ):
            self._rows[slot] = row
            if finite:
                row.begin(token)
            else:
                self._fail(slot, row)
        self.policy.enter(len(entering), self.active)
        self._settings = None
        self.timing.prefill += time.perf_counter() - started

    def _round(self, rows: list[Row]) -> None:
        """Draft, verify in one target pass, keep."""
        started = time.perf_counter()
        batch = self._batch(rows)
        proposal = self._rounds.draft(batch)
        drafted_at = time.perf_counter()
        self._book(rows, self._rounds.verify(batch, proposal))
        self.timing.draft += drafted_at - started
        self.timing.verify += time.perf_counter() - drafted_at
        self.timing.rounds += 1

    def _batch(self, rows: list[Row]) -> Batch:
        """The round's rows on the device; for a graph as many as it was captured for, in slots that are free."""
        missing = next_size(len(rows), self._sizes) - len(rows) if self._graphs else 0
        if self._settings is None:
            seen = None if self._seen is None else self._seen[: len(rows) + missing]
            requests = [row.request for row in rows] + [IDLE] * missing
            self._settings = SamplingSettings.of_requests(requests, self.target.vocab_size, self._device, seen)
        starts = [row.length for row in rows] + [0] * missing
        last = [row.anchor for row in rows] + [0] * missing
        anchors, lengths = self._sent(torch.tensor([last, starts]))
        end = max(starts) + self.block_size + 1
        if self._graphs:
            end = min(self.max_length, cache_columns(end))
        uniform = self._uniform(rows, self._settings, missing)
        return Batch(len(rows), starts, anchors, lengths, uniform, self._settings, end)

    def _book(self, rows: list[Row], outcome: Outcome) -> None:
        """Bring a round's outcome to the host, all at once, and into the rows."""
        verdict, proposal, drafted = outcome.verdict, outcome.proposal, 0
        columns = [outcome.finite, outcome.proposed[:, None], verdict.accepted[:, None], verdict.next_token[:, None]]
        if proposal is not None:
            drafted = proposal.tokens.shape[1]
            columns.append(proposal.tokens)
            if proposal.confidences is not None:
                columns.append(proposal.confidences)
        values = torch.cat([column[: len(rows)].double() for column in columns], dim=1).tolist()
        kept = {}
        for slot, (row, (is_finite, *of_row)) in enumerate(zip(rows, values, strict=True)):
            if is_finite:
                proposed, accepted, next_token, *drafts = map(int, of_row[: 3 + drafted])
                row.advance(proposed, drafts[:accepted], next_token, of_row[3 + drafted :] or None)
                if not row.finished:
                    kept[slot] = 1 + accepted
            else:
                self._fail(slot, row)
        if not outcome.is_certain:
            self._cache.keep(kept, outcome.longest)

    def _without_gaps(self) -> list[Row]:
        """Move the last rows into free slots, so that the active slots are the first ones. Only when nobody waits."""
        rows = self._rows
        for slot in reversed(range(len(rows))):
            if rows[slot] is None:
                last = rows.pop()
                if last is not None:
                    self._cache.move(len(rows), slot, last.length)
                    if self.proposer:
                        self.proposer.move(len(rows), slot, last.length)
                    if self._seen is not None:
                        self._seen[slot] = self._seen[len(rows)]
                    rows[slot] = last
        return [row for row in rows if row is not None]

    def _remember(self, slots: list[int], seen: Tensor) -> None:
        """Store which tokens, bool [rows, vocab], the prompts in these slots hold."""
        if self._seen is None:
            self._seen = torch.zeros(self.slots, self.target.vocab_size, dtype=torch.bool, device=self._device)
        self._seen[slots] = seen

    def _fail(self, slot: int, row: Row) -> None:
        row.fail()
        self._cache.clear(slot)
        if self.proposer:
            self.proposer.clear(slot)

    def _uniform(self, rows: list[Row], settings: SamplingSettings, idle: int = 0) -> Tensor | None:
        """float64 [rows, 2 * block_size + 1]: to draft, to accept, and for the next token; None if all are greedy."""
        if settings.all_greedy:
            return None
        unused = torch.zeros(2 * self.block_size + 1, dtype=torch.float64)
        drawn = [row.uniform() for row in rows] + [None] * idle
        return self._sent(torch.stack([unused if u is None else u for u in drawn]))

    def _sent(self, values: Tensor) -> Tensor:
        """On the device, without waiting for it."""
        return values if self._device.type == "cpu" else values.pin_memory().to(self._device, non_blocking=True)


def _check_settings(proposer: Proposer | None, slots: int, policy: Policy | None, verification: str) -> None:
    if verification not in VERIFICATION_RULES:
        raise ConfigError(
            f"decode.verification={verification}: must be one of {', '.join(VERIFICATION_RULES)}."
            f"{near_match(verification, VERIFICATION_RULES)}"
        )
    if slots < 1:
        raise ConfigError(f"decode.batch_size={slots}: must be at least 1")
    if policy and proposer:
        _check_policy(policy, proposer, slots)


def _check_policy(policy: Policy, proposer: Proposer, slots: int) -> None:
    name = type(policy).__name__
    if policy.needs_confidences and not proposer.has_confidences:
        raise ConfigError(
            f"{name}: this draft has no confidence head; train one with draft.confidence_head=true or "
            "set decode.policy=fixed"
        )
    if policy.maximum > proposer.block_size:
        raise ConfigError(
            f"{name}: verifies up to {policy.maximum} tokens of a row, but the proposer drafts {proposer.block_size}; "
            "make the policy for its block"
        )
    if policy.rows is not None and policy.rows < slots:
        raise ConfigError(
            f"{name}: its costs are known for at most {policy.rows} rows, but the engine has {slots} slots; make the "
            f"RoundCost for {slots} rows"
        )

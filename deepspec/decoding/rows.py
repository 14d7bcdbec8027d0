"""One active request and its bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from deepspec.decoding.requests import Completion, Request, Round
from deepspec.decoding.sampling import UniformStream
from deepspec.decoding.stopping import StopCondition


@dataclass
class Row:
    """A request in a slot. Its anchor is its last token, at position `length`; the caches hold everything before it."""

    index: int  # among the requests of this call
    request: Request
    stream: UniformStream | None  # None = greedy
    stop: StopCondition
    length: int
    anchor: int = -1
    completion: Completion = field(default_factory=Completion)

    @property
    def finished(self) -> bool:
        return bool(self.completion.finish_reason)

    def uniform(self) -> Tensor | None:
        return self.stream.draw() if self.stream else None

    def begin(self, token: int) -> None:
        """Book the token of the prefill pass."""
        self._emit([token], self.stop.end([], [token]) is not None)

    def advance(self, proposed: int, kept: list[int], next_token: int, confidences: list[float] | None) -> None:
        """Book one round: `kept` of the `proposed` drafted tokens, and the token after them."""
        new = [*kept, next_token]
        end = self.stop.end(self.completion.output_ids, new)
        if end is not None and end <= len(kept):
            proposed, kept, new = end, kept[:end], kept[:end]
        emitted = min(len(new), self.request.max_new_tokens - len(self.completion.output_ids))
        of_proposed = None if confidences is None else confidences[:proposed]
        self.completion.rounds.append(Round(proposed, len(kept), emitted, of_proposed))
        self.length += len(new)
        self._emit(new[:emitted], end is not None and end <= emitted)

    def fail(self) -> None:
        """End the request; what it wrote before stays."""
        self.completion.finish_reason = "error"

    def _emit(self, tokens: list[int], stopped: bool) -> None:
        self.completion.output_ids += tokens
        self.anchor = tokens[-1]
        if stopped:
            self.completion.finish_reason = "stop"
        elif len(self.completion.output_ids) >= self.request.max_new_tokens:
            self.completion.finish_reason = "length"

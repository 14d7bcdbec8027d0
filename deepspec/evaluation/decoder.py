"""Decoding a chunk of prompts with a draft and without it, turn by turn."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepspec.config import EvalRun
from deepspec.decoding import Completion, Request, SpeculativeEngine
from deepspec.evaluation.plan import Chunk, Plan, fits, new_tokens
from deepspec.evaluation.records import Decoding, Record
from deepspec.evaluation.sets import Prompt

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class _Turn:
    """A prompt of the chunk in one of its turns."""

    place: int  # of the prompt in the chunk
    number: int  # of the turn, from 0
    ids: list[int]


@dataclass(frozen=True)
class Decoder:
    """Both ways of decoding a chunk."""

    config: EvalRun
    plan: Plan
    speculative: SpeculativeEngine
    plain: SpeculativeEngine | None
    text_of: Callable[[list[int]], str]

    def decode(self, chunk: Chunk, *, plain_first: bool) -> Record:
        """All turns of the prompts. The prompt of a later turn holds the answers that speculative decoding gave before,
        for both ways alike. A turn that has become too long and those behind it are not decoded.

        Raises:
            DataError: the chat template refuses the messages of a later turn.
        """
        size = len(chunk.prompts)
        speculative, plain = _Collected(size), _Collected(size)
        turns = [_Turn(place, 0, prompt.ids) for place, prompt in enumerate(chunk.prompts)]
        while turns:
            if self.plain and plain_first:
                plain.add(turns, self._timed(self.plain, chunk, turns))
            speculative.add(turns, self._timed(self.speculative, chunk, turns))
            if self.plain and not plain_first:
                plain.add(turns, self._timed(self.plain, chunk, turns))
            turns = self._following(chunk, turns, speculative)
        counts = [len(completions) for completions in speculative.of_prompts]
        return Record(*chunk.key, speculative.whole(), plain.whole() if self.plain else None, counts)

    def warm_up(self, chunk: Chunk) -> None:
        """Decode a few tokens, so that no chunk pays for first-time allocations."""
        turns = [_Turn(place, 0, prompt.ids) for place, prompt in enumerate(chunk.prompts)]
        for engine in filter(None, (self.speculative, self.plain)):
            engine.generate(self._requests(chunk, turns, WARM_UP_TOKENS))

    def _following(self, chunk: Chunk, turns: Sequence[_Turn], decoded: _Collected) -> list[_Turn]:
        """The next turn of those prompts that have one which fits. A failed answer ends its conversation."""
        following = []
        for turn in turns:
            prompt, completions = chunk.prompts[turn.place], decoded.of_prompts[turn.place]
            if turn.number + 1 == len(prompt.given) or completions[-1].finish_reason == "error":
                continue
            ids = prompt.ids_after([self.answer(completion) for completion in completions])
            if fits(ids, self.config, self.plan.positions, self.plan.max_length, self.plan.draft_settings.draft_length):
                following.append(_Turn(turn.place, turn.number + 1, ids))
        return following

    def answer(self, completion: Completion) -> str:
        """What stands in later prompts: the text as it was written, without the token that ended the turn."""
        ids = completion.output_ids
        if ids and ids[-1] in self.plan.stop_token_ids:
            ids = ids[:-1]
        return self.text_of(ids)

    def _timed(self, engine: SpeculativeEngine, chunk: Chunk, turns: Sequence[_Turn]) -> Decoding:
        requests = self._requests(chunk, turns, self.config.decode.max_new_tokens)
        started = time.perf_counter()
        completions = engine.generate(requests)
        return Decoding(time.perf_counter() - started, completions)

    def _requests(self, chunk: Chunk, turns: Sequence[_Turn], max_new_tokens: int) -> list[Request]:
        decode = self.config.decode
        return [
            Request(
                prompt_ids=turn.ids,
                max_new_tokens=new_tokens(turn.ids, min(max_new_tokens, decode.max_new_tokens), self.plan.positions),
                temperature=chunk.temperature,
                top_k=decode.top_k,
                top_p=decode.top_p,
                min_p=decode.min_p,
                repetition_penalty=decode.repetition_penalty,
                seed=request_seed(self.config.seed, chunk.set_name, chunk.prompts[turn.place], turn.number),
                stop_token_ids=self.plan.stop_token_ids,
                stop_strings=tuple(decode.stop_strings),
            )
            for turn in turns
        ]


class _Collected:
    """What one way of decoding gave so far, by prompt of the chunk."""

    def __init__(self, prompts: int):
        self.of_prompts: list[list[Completion]] = [[] for _ in range(prompts)]
        self.seconds = 0.0

    def add(self, turns: Sequence[_Turn], decoding: Decoding) -> None:
        self.seconds += decoding.seconds
        for turn, completion in zip(turns, decoding.completions, strict=True):
            self.of_prompts[turn.place].append(completion)

    def whole(self) -> Decoding:
        return Decoding(self.seconds, [completion for of_prompt in self.of_prompts for completion in of_prompt])


def request_seed(seed: int, set_name: str, prompt: Prompt, turn: int = 0) -> int:
    """A stream of its own for each turn of each prompt, whatever rank and batch it is in."""
    name = f"{seed}/{set_name}/{prompt.index}" + (f"/{turn}" if turn else "")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")

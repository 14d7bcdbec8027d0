"""The target writes in this process, with the speculative engine: a question enters as soon as another one ends."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from deepspec.decoding import Completion, Request, SpeculativeEngine
from deepspec.regeneration.text import text_behind
from deepspec.regeneration.writer import Answer, Outcome, Question, Refusal, Sampling

AHEAD = 1  # questions that wait for a slot, as many as there are slots: a prompt pass then fills what is free


class EngineWriter:
    """Answers depend on the question alone, not on what is decoded beside it."""

    def __init__(self, engine: SpeculativeEngine, tokenizer: PreTrainedTokenizerBase, sampling: Sampling):
        self.limit = engine.max_length - engine.block_size
        self._engine = engine
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._asked: dict[int, Question] = {}

    @property
    def room(self) -> int:
        return (1 + AHEAD) * self._engine.slots - len(self._asked)

    @property
    def in_flight(self) -> int:
        return self._engine.active

    @property
    def tokens_under_way(self) -> int:
        return self._engine.written

    def put(self, question: Question) -> None:
        request = Request(
            prompt_ids=question.prompt_ids,
            max_new_tokens=question.max_new_tokens,
            temperature=self._sampling.temperature,
            top_k=self._sampling.top_k,
            top_p=self._sampling.top_p,
            min_p=self._sampling.min_p,
            seed=question.seed,
            stop_token_ids=question.stop_token_ids,
            stop_strings=question.stop_strings,
        )
        self._asked[self._engine.submit(request)] = question

    def wait(self) -> list[Outcome]:
        outcomes = []
        for number, completion in self._engine.step():
            question = self._asked.pop(number)
            outcomes.append((question, self._read(question, completion)))
        return outcomes

    def close(self) -> None:
        self._asked.clear()

    def _read(self, question: Question, completion: Completion) -> Answer | Refusal:
        if completion.finish_reason == "error":
            return Refusal(
                "the target's logits are not finite: is a weight damaged, or target.dtype too narrow?", is_final=False
            )
        text = text_behind(self._tokenizer, question.prompt_ids, completion.output_ids)
        return Answer(text, len(completion.output_ids), completion.finish_reason)

"""A server that computes nothing: rounds take what an SPS table says, and accept what an evaluation has recorded.

Each request stands for one recorded answer: it writes as many tokens, and each of its rounds is drawn from the rounds
of that answer, confidences and accepted count together. Of L tokens that a policy verifies, min(accepted, L) are kept.

What this leaves out. Rounds were recorded behind whole blocks, so they begin where a block was rejected: shorter
verification would begin more often in stretches that go well, and keep a little more than is computed here. Drafting
takes the table's time for every policy that drafts, though a single token is drafted faster. A prompt takes the pass of
its tokens, or nothing where other machines read prompts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deepspec.data.jsonl import DataError, read_jsonl
from deepspec.decoding import Completion, Round
from deepspec.decoding.policies import Policy
from deepspec.decoding.recorded_rounds import METRICS_FILE, ROUNDS_FILE, metrics_of, whole_blocks
from deepspec.decoding.reliability import Floats
from deepspec.decoding.sps import SpsTable


@dataclass(frozen=True)
class Answer:
    """A recorded answer: how long it was and how its rounds went."""

    tokens: int
    confidences: Floats  # [rounds, block_size]
    accepted: NDArray[np.int64]  # [rounds]


def read_answers(folder: str | Path, temperature: float) -> dict[str, list[Answer]]:
    """The answers of each set that an evaluation sampled at this temperature, with whole blocks verified.

    Rounds that a stop token cut are not drawn from; an answer without any other round is left out.

    Raises:
        DataError: no finished evaluation there, nothing at this temperature, or rounds that did not verify whole
            blocks or have no confidences.
    """
    folder = Path(folder)
    metrics = metrics_of(folder)
    try:
        digest, block_size = metrics["settings_digest"], metrics["draft"]["block_size"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / METRICS_FILE}: not the metrics of an evaluation ({error} is missing)") from error
    answers: dict[str, list[Answer]] = {}
    others: set[float] = set()
    for place, row in read_jsonl(folder / ROUNDS_FILE):
        if row.get("settings") != digest:
            continue
        try:
            if row["temperature"] != temperature:
                others.add(row["temperature"])
                continue
            for completion in row["speculative"]["completions"]:
                whole = [entry for entry in whole_blocks(completion, block_size, place) if entry[0] == block_size]
                if whole:
                    _, accepted, confidences = zip(*whole, strict=True)
                    answer = Answer(len(completion["output_ids"]), np.array(confidences), np.array(accepted))
                    answers.setdefault(row["set_name"], []).append(answer)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{place}: not a record of an evaluation ({type(error).__name__}: {error})") from error
    if not answers:
        known = ", ".join(f"{value:g}" for value in sorted(others))
        raise DataError(
            f"{folder / ROUNDS_FILE}: no rounds of whole blocks at temperature={temperature:g}; others there: "
            f"{known or 'none'}"
        )
    return answers


@dataclass
class _Row:
    number: int
    answer: Answer
    order: NDArray[np.int64]  # which of the answer's rounds comes when; never more rounds than tokens
    completion: Completion = field(default_factory=Completion)

    def emit(self, tokens: int) -> None:
        self.completion.output_ids += [0] * tokens
        if len(self.completion.output_ids) >= self.answer.tokens:
            self.completion.finish_reason = "length"


class ModelServer:
    """Serves answers as the engine does: in slots, with a pass for those that enter, then rounds of all inside."""

    def __init__(self, table: SpsTable, policy: Policy, slots: int, *, prompt_tokens: int = 0, seed: int = 0):
        """
        Args:
            policy: where nothing is to be drafted, a round is plain.
            prompt_tokens: of each request; 0 = other machines read the prompts.
            seed: request n goes through its recorded rounds in an order that depends on the seed and n alone.
        """
        self.passes = 0
        self._table, self._policy, self._slots = table, policy, slots
        self._prompt_tokens, self._seed = prompt_tokens, seed
        self._rows: list[_Row] = []
        self._waiting: deque[_Row] = deque()
        self._submitted = 0

    @property
    def written(self) -> int:
        return sum(len(row.completion.output_ids) for row in self._rows)

    def submit(self, answer: Answer) -> int:
        number = self._submitted
        order = np.random.default_rng([self._seed, number]).integers(len(answer.accepted), size=answer.tokens)
        self._waiting.append(_Row(number, answer, order))
        self._submitted += 1
        return number

    def step(self) -> tuple[float, list[tuple[int, Completion]]]:
        free = self._slots - len(self._rows)
        if self._waiting and free:
            seconds = self._enter(min(free, len(self._waiting)))
        elif self._rows:
            seconds = self._round()
        else:
            return 0.0, []
        ended = [(row.number, row.completion) for row in self._rows if row.completion.finish_reason]
        self._rows = [row for row in self._rows if not row.completion.finish_reason]
        return seconds, ended

    def _enter(self, count: int) -> float:
        entering = [self._waiting.popleft() for _ in range(count)]
        for row in entering:
            row.emit(1)
        self._rows += entering
        self._policy.enter(count, len(self._rows))
        tokens = count * self._prompt_tokens
        return float(self._table.pass_seconds(tokens)) if tokens else 0.0

    def _round(self) -> float:
        rows = self._rows
        drawn = [row.order[len(row.completion.rounds)] for row in rows]
        drafted = self._policy.to_draft(len(rows))
        lengths = [0] * len(rows)
        if drafted:
            confidences = np.stack([row.answer.confidences[at] for row, at in zip(rows, drawn, strict=True)])
            lengths = self._policy.lengths(torch.from_numpy(confidences)[:, :drafted], len(rows)).tolist()
        for row, at, length in zip(rows, drawn, lengths, strict=True):
            accepted = min(int(row.answer.accepted[at]), length)
            emitted = min(accepted + 1, row.answer.tokens - len(row.completion.output_ids))
            row.completion.rounds.append(Round(length, accepted, emitted, None))
            row.emit(emitted)
        self.passes += 1
        return float(self._table.round_seconds(len(rows) + sum(lengths), len(rows), drafting=drafted > 0))

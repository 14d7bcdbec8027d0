"""Engines of one target and draft on this machine, and the requests and the SPS table for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import torch

from benchmarks.load_serving import EngineServer
from deepspec.decoding import Request, SpeculativeEngine, proposer_of
from deepspec.decoding.policies import Policy
from deepspec.decoding.profile import ProfileOptions, profile
from deepspec.drafts import load_draft
from deepspec.evaluation.plan import stop_tokens
from deepspec.evaluation.sets import load_set
from deepspec.files import write_atomically
from deepspec.targets import load_target, load_tokenizer

CONTEXT = 128  # tokens in the cache while the table is measured


class EngineLoad:
    """A target, its draft, and requests of each prompt set."""

    def __init__(
        self,
        checkpoint: str,
        target: str,
        *,
        prompts_dir: str,
        sets: Sequence[str],
        prompts: int,
        max_new_tokens: int,
        temperature: float,
    ):
        """
        Args:
            prompts: at most, of each set.

        Raises:
            ConfigError, DataError, CheckpointError, FileNotFoundError: no such draft, target or set, or a damaged one.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._target = load_target(target, device=self.device)
        self._draft = load_draft(checkpoint, dtype=self._target.dtype, device=self.device, target=self._target)
        self.block_size = self._draft.draft_length
        self.has_confidences = self._draft.confidence_head is not None
        tokenizer = load_tokenizer(target)
        stops, seeds = stop_tokens(target, None, tokenizer), count()
        self.requests = {
            name: [
                Request(prompt.ids, max_new_tokens, temperature, seed=next(seeds), stop_token_ids=stops)
                for prompt in load_set(name, prompts_dir, tokenizer, limit=prompts)
            ]
            for name in sets
        }
        longest = max(len(request.prompt_ids) for of_set in self.requests.values() for request in of_set)
        self._max_length = longest + max_new_tokens + self.block_size

    def server(self, slots: int, policy: Policy | None) -> EngineServer:
        """An engine; without a policy one that decodes plainly."""
        proposer = proposer_of(self._draft, self._target) if policy else None
        return EngineServer(
            SpeculativeEngine(self._target, proposer, slots=slots, max_length=self._max_length, policy=policy)
        )


def measure_table(checkpoint: str, target: str, block_size: int, rows: int, repeats: int, file: Path) -> None:
    """Measure the SPS table for up to so many rows and write it to a file."""
    options = ProfileOptions(
        checkpoint,
        target,
        tokens=list(sizes_to(rows * (block_size + 1))),
        rows=list(sizes_to(rows)),
        context=CONTEXT,
        repeats=repeats,
    )
    write_atomically(file, json.dumps(profile(options), indent=1) + "\n")


def sizes_to(largest: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and the largest."""
    size = 1
    while size < largest:
        yield size
        if size >= 2 and size + size // 2 < largest:
            yield size + size // 2
        size *= 2
    yield largest

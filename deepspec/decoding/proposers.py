"""Proposers: where drafted tokens come from. Plain decoding is the engine without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deepspec.decoding.cache import KeyValueStore
from deepspec.decoding.sampling import SamplingSettings, probabilities, sample
from deepspec.drafts import DSparkModel
from deepspec.targets import Target


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens of a batch of rows."""

    tokens: Tensor  # long [rows, slots]
    probabilities: Tensor  # [rows, slots, vocab], what each token was drawn from
    confidences: Tensor | None  # [rows, slots], the probability that token k is kept given that all before it were


class Proposer(Protocol):
    """Drafts from the target's features; keeps its own per-slot state, rewound by position like the engine's."""

    block_size: int
    layer_ids: Sequence[int]  # target layers whose output it reads

    def allocate(self, slots: int, columns: int) -> None:
        """Make room for that many slots of that many positions."""

    def observe(self, slots: Tensor, positions: Tensor, features: Tensor) -> None:
        """Features [rows, tokens, layers * hidden] of target tokens at `positions` [rows, tokens].

        Later calls may overwrite positions: the last word counts.
        """

    def propose(
        self, anchor_tokens: Tensor, positions: Tensor, settings: SamplingSettings, uniform: Tensor
    ) -> Proposal:
        """Draft for the first rows' slots after `anchor_tokens` [rows] at `positions` [rows], on uniform [rows, slots]."""

    def move(self, source: int, destination: int, length: int) -> None:
        """Move a slot's state."""


class DSparkProposer:
    """DSpark and DFlash: one parallel pass of the backbone, then the sequential head token by token."""

    def __init__(self, draft: DSparkModel, target: Target):
        check_draft_fits(draft, target)
        self.draft = draft.eval()
        self.block_size = draft.block_size
        self.layer_ids: Sequence[int] = draft.target_layer_ids
        self._store: KeyValueStore | None = None
        self._columns = torch.arange(0)

    def allocate(self, slots: int, columns: int) -> None:
        weight = self.draft.fc.weight
        self._store = KeyValueStore(self.draft.config, slots, columns, weight.dtype, weight.device)
        self._columns = torch.arange(columns, device=weight.device)

    @property
    def store(self) -> KeyValueStore:
        assert self._store is not None, "allocate comes first"
        return self._store

    def observe(self, slots: Tensor, positions: Tensor, features: Tensor) -> None:
        context = self.draft.project_context(features)
        for layer, (keys, values) in enumerate(self.draft.context_key_values(context, positions)):
            self.store.write(layer, slots, positions, keys, values)

    def propose(
        self, anchor_tokens: Tensor, positions: Tensor, settings: SamplingSettings, uniform: Tensor
    ) -> Proposal:
        draft, rows = self.draft, len(anchor_tokens)
        columns = self._columns[: int(positions.max())]
        context = [
            (self.store.keys[layer, :rows, :, : len(columns)], self.store.values[layer, :rows, :, : len(columns)])
            for layer in range(draft.config.num_hidden_layers)
        ]
        hidden = draft.draft_block(anchor_tokens, positions, context, columns < positions[:, None])
        logits = draft.base_logits(hidden)
        if draft.markov_head is None:
            drawn_from = probabilities(logits, settings)
            tokens = sample(drawn_from, uniform)
            return Proposal(tokens, drawn_from, self._confidences(hidden, None))
        state = draft.markov_head.initial_state(hidden[:, 0])
        tokens_so_far, distributions = [anchor_tokens], []
        for slot in range(self.block_size):
            latent, state = draft.markov_head.step(tokens_so_far[-1], hidden[:, slot], state)
            biased = logits[:, slot] + draft.markov_head.bias(latent).float()
            distributions.append(probabilities(biased[:, None], settings))
            tokens_so_far.append(sample(distributions[-1][:, 0], uniform[:, slot]))
        previous = torch.stack(tokens_so_far[:-1], dim=1)
        confidences = self._confidences(hidden, draft.markov_head.embed(previous))
        return Proposal(torch.stack(tokens_so_far[1:], dim=1), torch.cat(distributions, dim=1), confidences)

    def move(self, source: int, destination: int, length: int) -> None:
        self.store.move(source, destination, length)

    def _confidences(self, hidden: Tensor, embedding: Tensor | None) -> Tensor | None:
        if self.draft.confidence_head is None:
            return None
        return self.draft.confidence_head(hidden, embedding).float().sigmoid()


def check_draft_fits(draft: DSparkModel, target: Target) -> None:
    """Refuse a draft that was not made for this target.

    Raises:
        ValueError: vocabulary, hidden size or depth differ, or the recorded fingerprint is another target's.
    """
    for what, of_draft, of_target in (
        ("vocabulary", draft.config.vocab_size, target.vocab_size),
        ("hidden size", draft.config.hidden_size, target.hidden_size),
    ):
        if of_draft != of_target:
            raise ValueError(f"the draft has a {what} of {of_draft}, the target {target.name_or_path} of {of_target}")
    recorded = getattr(draft.config, "target_fingerprint", None)
    if recorded and recorded != target.fingerprint:
        raise ValueError(
            f"this draft belongs to the target {draft.config.target_model_name_or_path} with fingerprint {recorded[:12]}, "
            f"not to {target.name_or_path} with fingerprint {target.fingerprint[:12]}"
        )

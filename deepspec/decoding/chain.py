"""Eagle3's proposer: one token after another, each from the draft's own last state (EAGLE-3, arXiv 2503.01840)."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.decoding.proposers import DraftProposer, Proposal
from deepspec.decoding.sampling import SamplingSettings, draw
from deepspec.decoding.span import Span
from deepspec.drafts import Eagle3Model

LAYER = 0


class Eagle3Proposer(DraftProposer[Eagle3Model]):
    """Keeps, by position, the states that `fc` makes of the target's, and keys and values of each token with the state
    before it.

    A token is known when it is observed, and so is the state before it: nothing has to be guessed or made again when a
    drafted token is rejected. The anchor, which nobody has observed yet, is the first step of the chain.
    """

    def bytes_per_slot(self, columns: int) -> int:
        state = self.draft.config.hidden_size * self.draft.fc.weight.dtype.itemsize
        return super().bytes_per_slot(columns) + columns * state

    def allocate(self, slots: int, columns: int) -> None:
        super().allocate(slots, columns)
        # [slots, columns, hidden]; zero, thus finite, until written
        self._states = self.draft.fc.weight.new_zeros(slots, columns, self.draft.config.hidden_size)

    def observe(self, span: Span, ids: Tensor, features: Tensor) -> None:
        self._states[span.slot_of, span.positions] = self.draft.context_states(features)
        previous = self._states[span.slot_of, (span.positions - 1).clamp(min=0)]
        key_values = self.draft.context_key_values(ids[None], previous[None], span.positions[None])
        self.store.write(LAYER, span, *key_values)

    def propose(
        self,
        anchors: Tensor,
        positions: Tensor,
        columns: int,
        settings: SamplingSettings,
        uniform: Tensor | None,
        length: int,
    ) -> Proposal:
        rows = len(anchors)
        context = self.store.read(LAYER, range(rows), columns)
        spans = self.draft.anchor_spans(positions[:, None])
        row = torch.arange(rows, device=positions.device)
        state = self._states[row, (positions - 1).clamp(min=0)][:, None]
        token, own, tokens, distributions = anchors[:, None], None, [], []
        penalty = settings.penalty and settings.penalty.of_columns(self.draft.kept_tokens)
        for step in range(length):
            state, own = self.draft.step(token, state, positions[:, None] + step, context, spans, own)
            logits = self.draft.base_logits(self.draft.norm(state))
            of_step = None if uniform is None else uniform[:, step : step + 1]
            drawn, distribution = draw(penalty.apply(logits) if penalty else logits, settings, of_step)
            if penalty:
                penalty = penalty.after(drawn)
            token = self.draft.target_ids(drawn)
            tokens.append(token)
            if distribution is not None:
                distributions.append(distribution)
        drawn_from = self.draft.over_target(torch.cat(distributions, dim=1)) if distributions else None
        return Proposal(torch.cat(tokens, dim=1), drawn_from, None)

    def move(self, source: int, destination: int, length: int) -> None:
        super().move(source, destination, length)
        self._states[destination, :length] = self._states[source, :length]

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self._states[slot].zero_()

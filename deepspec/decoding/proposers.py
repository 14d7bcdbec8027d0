"""Proposers: where drafted tokens come from. Plain decoding is the engine without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from deepspec.config import ConfigError
from deepspec.decoding.cache import KeyValueStore
from deepspec.decoding.sampling import SamplingSettings, draw
from deepspec.decoding.span import Span
from deepspec.drafts import DraftModel, DSparkModel
from deepspec.drafts.families import head_dim_of
from deepspec.drafts.heads import MarkovHead
from deepspec.drafts.loading import check_target
from deepspec.kernels.biased_sampling import argmax_biased, draw_biased
from deepspec.kernels.dispatch import runs_in_triton
from deepspec.kernels.rms_norm import fuse_norms
from deepspec.targets import Target
from deepspec.targets.layers import KeyValueShape

Draft = TypeVar("Draft", bound=DraftModel)


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens of a batch of rows."""

    tokens: Tensor  # long [rows, length]
    probabilities: Tensor | None  # [rows, length, vocab], what each token was drawn from; None = that token for sure
    confidences: Tensor | None  # [rows, length], the probability that token k is kept given that all before it were


class Proposer(Protocol):
    """Drafts from the target's features; keeps its own per-slot state, rewound by position like the engine's."""

    block_size: int  # tokens that it drafts a round, at most
    layer_ids: Sequence[int]  # target layers whose output it reads
    has_confidences: bool

    def bytes_per_slot(self, columns: int) -> int:
        """What `allocate` takes for each slot."""

    def allocate(self, slots: int, columns: int) -> None:
        """Make room for that many slots of that many positions."""

    def observe(self, span: Span, ids: Tensor, features: Tensor) -> None:
        """Tokens [total] and their features [total, layers * hidden] at the positions of `span`.

        Later calls may overwrite positions: the last word counts.
        """

    def propose(
        self,
        anchors: Tensor,
        positions: Tensor,
        columns: int,
        settings: SamplingSettings,
        uniform: Tensor | None,
        length: int,
    ) -> Proposal:
        """Draft for the first rows' slots.

        Args:
            anchors: long [rows], each row's last token.
            positions: long [rows], the anchors' positions.
            columns: the largest of them, or more.
            uniform: float64 [rows, block_size]; None when every row is greedy.
            length: how many tokens of each row, 1..block_size.
        """

    def move(self, source: int, destination: int, length: int) -> None:
        """Move a slot's state."""

    def clear(self, slot: int) -> None:
        """Forget a slot whose row was not finite."""


class DraftProposer(Generic[Draft]):
    """What the proposers of trained drafts have in common: the checked draft, and keys and values of its layers."""

    def __init__(self, draft: Draft, target: Target, *, allow_other_target: bool = False):
        """
        Args:
            allow_other_target: one of other weights but the same shape will do.

        Raises:
            ConfigError: the draft was not made for this target.
        """
        _check_fits(draft, target, allow_other_target=allow_other_target)
        self.draft = draft.eval()
        if draft.fc.weight.is_cuda:
            fuse_norms(draft)
        self.block_size = draft.draft_length
        self.layer_ids: Sequence[int] = draft.target_layer_ids
        self.has_confidences = draft.confidence_head is not None
        self._layers = range(draft.config.num_hidden_layers)
        heads = (draft.config.num_key_value_heads, head_dim_of(draft.config))
        self._key_values = KeyValueShape(heads, heads, draft.fc.weight.dtype)
        self._store: KeyValueStore | None = None

    def bytes_per_slot(self, columns: int) -> int:
        return columns * len(self._layers) * self._key_values.bytes

    def allocate(self, slots: int, columns: int) -> None:
        shapes = dict.fromkeys(self._layers, self._key_values)
        self._store = KeyValueStore(shapes, slots, columns, self.draft.fc.weight.device)

    @property
    def store(self) -> KeyValueStore:
        assert self._store is not None, "allocate comes first"
        return self._store

    def move(self, source: int, destination: int, length: int) -> None:
        self.store.move(source, destination, length)

    def clear(self, slot: int) -> None:
        self.store.clear(slot)


def _check_fits(draft: DraftModel, target: Target, *, allow_other_target: bool) -> None:
    """Raises ConfigError: see `DraftProposer`."""
    if not allow_other_target:
        check_target(draft, target)
    deepest = max(draft.target_layer_ids)
    if deepest >= target.num_layers:
        raise ConfigError(
            f"this draft reads layers up to {deepest}, but target {target.name_or_path} has {target.num_layers} "
            "(numbered from 0); load the target it was trained for"
        )


class DSparkProposer(DraftProposer[DSparkModel]):
    """DSpark and DFlash: one parallel pass of the backbone, then the sequential head token by token."""

    def observe(self, span: Span, ids: Tensor, features: Tensor) -> None:
        context = self.draft.project_context(features[None])
        for layer, (keys, values) in enumerate(self.draft.context_key_values(context, span.positions[None])):
            self.store.write(layer, span, keys, values)

    def propose(
        self,
        anchors: Tensor,
        positions: Tensor,
        columns: int,
        settings: SamplingSettings,
        uniform: Tensor | None,
        length: int,
    ) -> Proposal:
        slots = range(len(anchors))
        context = [self.store.read(layer, slots, columns) for layer in self._layers]
        hidden = self.draft.draft_block(anchors, positions, context)[:, :length]
        tokens, distribution = draw_block(self.draft, anchors, hidden, settings, uniform)
        return Proposal(tokens, distribution, self._confidences(anchors, hidden, tokens))

    def _confidences(self, anchors: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor | None:
        if self.draft.confidence_head is None:
            return None
        embedding = None
        if self.draft.markov_head is not None:
            embedding = self.draft.markov_head.embed(torch.cat([anchors[:, None], tokens[:, :-1]], dim=1))
        return self.draft.confidence_head(hidden, embedding).float().sigmoid()


def draw_block(
    draft: DSparkModel, anchors: Tensor, hidden: Tensor, settings: SamplingSettings, uniform: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Draw the tokens of a block: left to right, each biased by those before it, if the draft has a sequential head
    (DSpark section 3.2); else all at once.

    Args:
        anchors: long [rows]
        hidden: [rows, slots, hidden], the backbone's output.
        uniform: float64 [rows, at least slots]; None when every row is greedy.

    Returns:
        Tokens [rows, slots] and what they were drawn from, [rows, slots, vocab of the target]; None when every row is
        greedy.
    """
    rows, drawn_from = _draw_rows(draft, anchors, hidden, settings, uniform)
    return draft.target_ids(rows), None if drawn_from is None else draft.over_target(drawn_from)


def _draw_rows(
    draft: DSparkModel, anchors: Tensor, hidden: Tensor, settings: SamplingSettings, uniform: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`draw_block` in the rows of the draft's head."""
    logits, head, slots = draft.base_logits(hidden), draft.markov_head, hidden.shape[1]
    penalty = settings.penalty and settings.penalty.of_columns(draft.kept_tokens)
    if head is None:
        uniform = None if uniform is None else uniform[:, :slots]
        return draw(penalty.apply(logits) if penalty else logits, settings, uniform)
    is_fused = settings.is_plain and penalty is None and runs_in_triton(logits, None)
    previous, tokens = anchors[:, None], []
    drawn_from = None if settings.all_greedy else torch.empty_like(logits, dtype=torch.float32)
    state = head.initial_state(hidden[:, :1])
    for slot in range(slots):
        here = slice(slot, slot + 1)
        latent, state = head.step(previous, hidden[:, here], state)
        of_slot = None if uniform is None else uniform[:, here]
        if is_fused:
            into = None if drawn_from is None else drawn_from[:, slot]
            token = _draw_fused(head, logits[:, slot], head.scaled(latent[:, 0]), settings, of_slot, into)
        else:
            biased = logits[:, here] + head.bias(latent)
            token, distribution = draw(penalty.apply(biased) if penalty else biased, settings, of_slot)
            if drawn_from is not None and distribution is not None:
                drawn_from[:, here] = distribution
        if penalty:
            penalty = penalty.after(token)
        tokens.append(token)
        previous = draft.target_ids(token)
    return torch.cat(tokens, dim=1), drawn_from


def _draw_fused(
    head: MarkovHead,
    logits: Tensor,
    latents: Tensor,
    settings: SamplingSettings,
    uniform: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """`draw` with the bias of a slot in one kernel.

    Logits [rows, vocab] and latents [rows, rank], both scaled -> tokens [rows, 1].
    """
    table = head.markov_w2.weight
    if uniform is None:
        return argmax_biased(logits, latents, table)[:, None]
    return draw_biased(logits, latents, table, settings.temperatures, uniform[:, 0], out)[0][:, None]

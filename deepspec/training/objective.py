"""The objective of DSpark and DFlash (DSpark section 4), and of Eagle3: cross-entropy, total variation, confidence.

L = ce * L_ce + tv * L_tv + confidence * L_conf, each a sum over supervised slots of w_k times the slot's loss.
The cross-entropy is that of the true tokens, of Eagle3 that of the target's distribution. Everything here returns sums;
the training loop divides by the weight sum (or `train.loss.divisor`) over all ranks and accumulation steps.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from deepspec.config import LossConfig
from deepspec.drafts import DraftModel
from deepspec.kernels.losses import vocabulary_losses
from deepspec.training.anchors import SlotLabels, loss_divisor
from deepspec.training.metrics import acceptance_sums


def compares_distributions(draft: DraftModel, loss: LossConfig) -> bool:
    """Whether the loss needs the target's probabilities, not only the true tokens."""
    return loss.tv > 0 or draft.confidence_head is not None or draft.soft_labels


def draft_objective(
    draft: DraftModel,
    hidden: Tensor,
    labels: SlotLabels,
    final_features: Tensor,
    block_mask: Tensor,
    loss: LossConfig,
    with_metrics: bool = True,
    target_head: Tensor | None = None,
) -> dict[str, Tensor]:
    """Loss and metric sums of one micro-batch, computed over supervised slots only.

    The target's probabilities are computed only when the loss or the metrics need them.

    Args:
        draft: gives the heads; must have no gradient on its `lm_head`.
        hidden: [rows, blocks, slots, hidden], the backbone's output.
        labels: from `supervise`.
        final_features: [rows, tokens, hidden], the target's states after its final norm.
        block_mask: bool [rows, blocks]
        loss: weights of the three losses. `confidence` counts only if the draft has the head.
        with_metrics: also sum acceptance and confidence error.
        target_head: [vocab, hidden], for a draft that cannot propose all tokens: it has not all of the head.

    Returns:
        `loss` (has the gradient), `weight_sum`, `ce`; `tv` where target probabilities were computed; `confidence_loss`
        with a confidence head and target probabilities; with metrics also those of `acceptance_sums` and
        `confidence_abs_error`, `confidence_bias`. Keys do not depend on the batch.
    """
    needs_target = with_metrics or compares_distributions(draft, loss)
    weights = labels.weights
    states = hidden.flatten(0, 2)[labels.slots]
    latents = None
    if draft.markov_head is not None:
        latents = draft.markov_head.latents(labels.prev_tokens, hidden).flatten(0, 2)[labels.slots]

    vocabulary = vocabulary_losses(
        states,
        latents,
        draft.lm_head.weight,
        None if draft.markov_head is None else draft.markov_head.markov_w2.weight,
        None if draft.soft_labels else draft.row_ids(labels.targets),
        final_features.flatten(0, 1)[labels.sources] if needs_target else None,
        weights,
        loss.ce,
        loss.tv,
        draft.settings.logit_scale,
        draft.settings.logit_softcap,
        draft.kept_tokens,
        target_head,
    )
    total = vocabulary.loss
    sums = {"weight_sum": weights.sum(), "ce": (weights * vocabulary.ce).sum()}
    if vocabulary.l1 is not None:
        accept = 1 - 0.5 * vocabulary.l1
        sums["tv"] = (weights * vocabulary.l1).sum()
        if with_metrics:
            sums |= acceptance_sums(accept, labels.slots, block_mask, labels.prev_tokens.shape[-1])
        if draft.confidence_head is not None:
            embedding = None
            if draft.markov_head is not None:
                embedding = draft.markov_head.embed(labels.prev_tokens.flatten()[labels.slots])
            logits = draft.confidence_head(states, embedding).float()
            cross_entropy = functional.binary_cross_entropy_with_logits(logits, accept, reduction="none")
            confidence_loss = (weights * cross_entropy).sum()
            total = total + loss.confidence * confidence_loss
            sums["confidence_loss"] = confidence_loss.detach()
            if with_metrics:
                error = logits.detach().sigmoid() - accept
                sums["confidence_abs_error"] = (weights * error.abs()).sum()
                sums["confidence_bias"] = (weights * error).sum()
    sums["loss"] = total
    return sums


class DraftTrainingModule(nn.Module):
    """The draft with its objective behind one `forward`, so that DDP or DeepSpeed wraps a single module.

    Every trainable parameter takes part in every backward pass, with a zero gradient where there is nothing to learn (a
    batch without supervised slots, a confidence head with weight 0), so no rank waits for a gradient that never comes.
    """

    target_head: Tensor | None

    def __init__(self, draft: DraftModel, loss: LossConfig, target_head: Tensor | None = None):
        """Args: `target_head`, see `draft_objective`; not saved with the draft."""
        super().__init__()
        self.draft = draft
        self.register_buffer("target_head", target_head, persistent=False)
        self.loss = loss
        self.config = draft.config  # accelerate sizes DeepSpeed's buffers by its hidden_size

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        anchor_columns: Tensor,
        block_mask: Tensor,
        prev_tokens: Tensor,
        slots: Tensor,
        targets: Tensor,
        sources: Tensor,
        weights: Tensor,
        context_features: Tensor,
        final_features: Tensor,
        with_metrics: bool = True,
    ) -> dict[str, Tensor]:
        """Sums of one micro-batch, see `draft_objective`.

        Args:
            input_ids, position_ids: [rows, tokens]
            anchor_columns, block_mask: [rows, blocks], from `sample_anchors`.
            prev_tokens, slots, targets, sources, weights: the fields of `SlotLabels`.
            context_features: [rows, tokens, captured layers * hidden]
            final_features: [rows, tokens, hidden]
        """
        hidden = self.draft(input_ids, position_ids, context_features, anchor_columns, block_mask)
        labels = SlotLabels(prev_tokens, slots, targets, sources, weights)
        sums = draft_objective(
            self.draft, hidden, labels, final_features, block_mask, self.loss, with_metrics, self.target_head
        )
        return sums | {"divisor": loss_divisor(weights, input_ids, self.loss.divisor)}

"""The objective of DSpark and DFlash (DSpark section 4): cross-entropy, total variation, confidence.

L = ce * L_ce + tv * L_tv + confidence * L_conf, each a sum over supervised slots of w_k times the slot's loss.
Everything here returns sums; the training loop divides by the weight sum over all ranks and accumulation steps.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from deepspec.config import LossConfig
from deepspec.drafts.dspark import DSparkModel
from deepspec.kernels.losses import vocabulary_losses
from deepspec.training.anchors import SlotLabels, supervise
from deepspec.training.metrics import acceptance_sums


def draft_objective(
    draft: DSparkModel,
    hidden: Tensor,
    labels: SlotLabels,
    final_features: Tensor,
    block_mask: Tensor,
    loss: LossConfig,
    with_metrics: bool = True,
) -> dict[str, Tensor]:
    """Loss and metric sums of one micro-batch, computed over supervised slots only.

    The target's probabilities are computed only when the loss or the metrics need them.

    Args:
        draft: gives the heads; must have no gradient on its `lm_head`.
        hidden: [batch, blocks, slots, hidden], the backbone's output.
        labels: from `supervise`.
        final_features: [batch, tokens, hidden], the target's states after its final norm.
        block_mask: bool [batch, blocks]
        loss: weights of the three losses. `confidence` counts only if the draft has the head.
        with_metrics: also sum acceptance and confidence error.

    Returns:
        `loss` (has the gradient), `weight_sum`, `ce`; `tv` where target probabilities were computed; `confidence_loss`
        with a confidence head and target probabilities; with metrics also those of `acceptance_sums` and
        `confidence_abs_error`, `confidence_bias`. Keys do not depend on the batch.
    """
    needs_target = with_metrics or loss.tv > 0 or draft.confidence_head is not None
    chosen = labels.supervised.flatten().nonzero().squeeze(1)  # [N]
    weights = labels.weights.flatten()[chosen]
    states = hidden.flatten(0, 2)[chosen]
    prev_tokens = labels.prev_tokens.flatten()[chosen]
    latents = None
    if draft.markov_head is not None:
        latents = draft.markov_head.latents(labels.prev_tokens, hidden).flatten(0, 2)[chosen]

    vocabulary = vocabulary_losses(
        states,
        latents,
        draft.lm_head.weight,
        None if draft.markov_head is None else draft.markov_head.markov_w2.weight,
        labels.targets.flatten()[chosen],
        _states_that_predict(labels, final_features)[chosen] if needs_target else None,
        weights,
        loss.ce,
        loss.tv,
    )
    total = vocabulary.loss
    sums = {"weight_sum": weights.sum(), "ce": (weights * vocabulary.ce).sum()}
    if vocabulary.l1 is not None:
        accept = 1 - 0.5 * vocabulary.l1
        sums["tv"] = (weights * vocabulary.l1).sum()
        if with_metrics:
            sums |= acceptance_sums(accept, labels.supervised, block_mask)
        if draft.confidence_head is not None:
            embedding = None if draft.markov_head is None else draft.markov_head.embed(prev_tokens)
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


def _states_that_predict(labels: SlotLabels, final_features: Tensor) -> Tensor:
    """The target's state at anchor + k - 1 for every slot: [batch * blocks * slots, hidden]"""
    positions = labels.source_positions.flatten(1)
    return final_features.gather(1, positions[..., None].expand(-1, -1, final_features.shape[-1])).flatten(0, 1)


class DraftTrainingModule(nn.Module):
    """The draft with its objective behind one `forward`, so that DDP or DeepSpeed wraps a single module.

    Every trainable parameter takes part in every backward pass, with a zero gradient where there is nothing to learn (a
    batch without supervised slots, a confidence head with weight 0), so no rank waits for a gradient that never comes.
    """

    def __init__(self, draft: DSparkModel, loss: LossConfig):
        super().__init__()
        self.draft = draft
        self.loss = loss
        self.config = draft.config  # accelerate sizes DeepSpeed's buffers by its hidden_size

    def forward(
        self,
        input_ids: Tensor,
        loss_mask: Tensor,
        attention_mask: Tensor,
        context_features: Tensor,
        final_features: Tensor,
        anchor_positions: Tensor,
        block_mask: Tensor,
        with_metrics: bool = True,
    ) -> dict[str, Tensor]:
        """Sums of one micro-batch, see `draft_objective`.

        Args:
            input_ids, loss_mask, attention_mask: [batch, tokens]
            context_features: [batch, tokens, captured layers * hidden]
            final_features: [batch, tokens, hidden]
            anchor_positions, block_mask: [batch, blocks], from `sample_anchors`.
        """
        draft = self.draft
        hidden = draft(input_ids, context_features, anchor_positions, block_mask, attention_mask.bool())
        labels = supervise(input_ids, loss_mask, anchor_positions, block_mask, draft.block_size, self.loss.decay)
        return draft_objective(draft, hidden, labels, final_features, block_mask, self.loss, with_metrics)

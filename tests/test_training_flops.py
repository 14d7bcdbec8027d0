"""The count of operations against what PyTorch counts while it computes."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_draft_config, token_batch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config

from deepspec.config import LossConfig
from deepspec.drafts import build_draft
from deepspec.features import OnlineFeatures
from deepspec.targets import Target
from deepspec.training.batches import MicroBatchMaker
from deepspec.training.flops import StepFlops
from deepspec.training.objective import DraftTrainingModule


@pytest.mark.parametrize("heads", [True, False])
def test_count_is_that_of_the_products_with_weights(heads):
    """Wide enough that the attention scores, which are not counted, are small."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    target = Target(AutoModelForCausalLM.from_config(config), "tiny")
    shape = {} if heads else {"algorithm": "dflash", "markov_rank": 0, "confidence_head": False}
    draft = build_draft(tiny_draft_config(config, target_layer_ids=[0, 1], mask_token_id=511, **shape), target)
    loss = LossConfig() if heads else LossConfig(ce=1.0, tv=0.0, confidence=0.0)
    features = OnlineFeatures(target, [0, 1])
    make = MicroBatchMaker(pad_id=0, packed=False, num_anchors=16, draft_length=5, decay=4.0, seed=0)
    tokens = token_batch(torch.randint(0, 500, (2, 48)))
    batch = make([sample_of(tokens, row) for row in range(2)])
    with FlopCounterMode(display=False) as counter:
        given = features.batch_features(batch.tokens)
        sums = DraftTrainingModule(draft, loss)(
            **batch.to(torch.device("cpu")),
            context_features=given.context,
            final_features=given.final,
            with_metrics=False,
        )
        sums["loss"].backward()
    count = StepFlops(draft, features.flops_per_token, needs_target_logits=heads)
    ours = count(batch.tokens.tokens, batch.num_blocks, batch.num_slots)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.1)


def sample_of(tokens, row):
    from deepspec.data.packing import Sample

    ids = tokens.input_ids[row].tolist()
    return Sample(row, 0, str(row), ids, [1] * len(ids))

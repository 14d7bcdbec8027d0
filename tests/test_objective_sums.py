"""The objective adds up: over any split of the batch, without supervised slots, with and without metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TinyBatch
from torch import Tensor

from deepspec.config import LossConfig
from deepspec.drafts import DSparkModel
from deepspec.kernels import losses as loss_kernels
from deepspec.training import objective
from deepspec.training.metrics import acceptance_sums, add_sums, summarize
from deepspec.training.objective import DraftTrainingModule

MakeDraft = Callable[..., DSparkModel]
DFLASH: dict[str, Any] = {"algorithm": "dflash", "markov_rank": 0, "confidence_head": False}
VARIANTS: list[dict[str, Any]] = [
    {"markov_head_type": "vanilla"},
    {"markov_head_type": "gated"},
    {"markov_head_type": "rnn", "family": "llama"},
    {"confidence_head_with_markov": False},
    DFLASH,
]


def run(
    draft: DSparkModel, batch: TinyBatch, loss: LossConfig | None = None, with_metrics: bool = True
) -> dict[str, Tensor]:
    loss = loss or LossConfig()
    return DraftTrainingModule(draft, loss)(
        **batch.for_objective(draft.block_size, loss.decay), with_metrics=with_metrics
    )


def gradients(draft: DSparkModel) -> dict[str, Tensor]:
    collected = {name: parameter.grad for name, parameter in draft.trainable_parameters()}
    assert all(gradient is not None for gradient in collected.values())
    draft.zero_grad()
    return collected  # type: ignore[return-value]


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_and_gradients_do_not_depend_on_the_split_or_on_packing(
    tiny_draft: MakeDraft, tiny_batch: TinyBatch, variant: dict[str, Any]
) -> None:
    draft = tiny_draft(**variant)
    whole = run(draft, tiny_batch)
    whole["loss"].backward()
    expected = gradients(draft)
    splits = [[tiny_batch.rows([0]), tiny_batch.rows([2, 1])], [tiny_batch.packed()]]
    splits.append([tiny_batch.packed((row,)) for row in range(3)])
    for split in splits:
        parts = [run(draft, batch) for batch in split]
        for part in parts:
            part["loss"].backward()
        for name, gradient in gradients(draft).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
        added = add_sums(parts)
        assert added.keys() == whole.keys()
        for name, value in added.items():
            torch.testing.assert_close(value, whole[name].detach(), rtol=1e-5, atol=1e-5)
        assert summarize(added) == pytest.approx(summarize(whole), rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(ce=1.0, tv=0.0, confidence=0.0)])
def test_every_trainable_parameter_gets_a_gradient(
    tiny_draft: MakeDraft, tiny_batch: TinyBatch, variant: dict[str, Any], loss: LossConfig
) -> None:
    draft = tiny_draft(**variant)
    for with_metrics in (True, False):
        run(draft, tiny_batch, loss, with_metrics)["loss"].backward()
        reached = gradients(draft)
        silent = {name for name, gradient in reached.items() if not gradient.any()}
        assert silent == {name for name in reached if name.startswith("confidence_head") and not loss.confidence}


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_supervised_slots_everything_is_zero(
    tiny_draft: MakeDraft, tiny_batch: TinyBatch, variant: dict[str, Any]
) -> None:
    draft = tiny_draft(**variant)
    batch = replace(tiny_batch, block_mask=torch.zeros_like(tiny_batch.block_mask))
    sums = run(draft, batch)
    assert sums.keys() == run(draft, tiny_batch).keys()
    assert all(not value.any() for value in sums.values())
    sums["loss"].backward()
    assert all(not gradient.any() for gradient in gradients(draft).values())
    assert summarize(sums) == {}


def test_padding_blocks_and_unsupervised_slots_do_not_count(tiny_draft: MakeDraft, tiny_batch: TinyBatch) -> None:
    draft = tiny_draft()
    before = run(draft, tiny_batch)
    wider = replace(
        tiny_batch,
        anchor_columns=torch.cat([tiny_batch.anchor_columns, torch.full((3, 2), 9)], dim=1),
        block_mask=torch.cat([tiny_batch.block_mask, torch.zeros(3, 2, dtype=torch.bool)], dim=1),
    )
    for name, value in run(draft, wider).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-5)
    ids = tiny_batch.input_ids.clone()
    ids[0, 9:12] = (ids[0, 9:12] + 1) % 60  # a user turn inside row 0, before and after which blocks stop
    changed = run(draft, replace(tiny_batch, input_ids=ids))
    torch.testing.assert_close(changed["loss"], before["loss"], rtol=1e-6, atol=0)


def test_target_probabilities_are_skipped_when_nobody_needs_them(
    tiny_draft: MakeDraft, tiny_batch: TinyBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []

    def spy(*args: Any) -> loss_kernels.VocabularyLosses:
        given.append(args[5] is not None)
        return loss_kernels.vocabulary_losses(*args)

    monkeypatch.setattr(objective, "vocabulary_losses", spy)
    draft, loss = tiny_draft(**DFLASH), LossConfig(ce=1.0, tv=0.0, confidence=0.0)
    quick = run(draft, tiny_batch, loss, with_metrics=False)
    full = run(draft, tiny_batch, loss, with_metrics=True)
    assert given == [False, True]
    assert torch.equal(quick["loss"], full["loss"])
    assert quick.keys() == {"loss", "ce", "weight_sum", "divisor"}
    assert full.keys() > quick.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_autocast_stays_close_to_float32(
    tiny_draft: MakeDraft, tiny_batch: TinyBatch, variant: dict[str, Any]
) -> None:
    draft = tiny_draft(**variant)
    exact = run(draft, tiny_batch)
    exact["loss"].backward()
    expected = gradients(draft)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(draft, tiny_batch)
    mixed["loss"].backward()
    assert all(value.dtype == torch.float32 for value in mixed.values())
    assert summarize(mixed) == pytest.approx(summarize(exact), rel=0.05, abs=0.02)
    for name, gradient in gradients(draft).items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.9, name


def test_nothing_but_the_loss_carries_a_gradient(tiny_draft: MakeDraft, tiny_batch: TinyBatch) -> None:
    sums = run(tiny_draft(), tiny_batch)
    assert [name for name, value in sums.items() if value.requires_grad] == ["loss"]


def test_the_label_of_the_confidence_head_is_detached(tiny_draft: MakeDraft, tiny_batch: TinyBatch) -> None:
    draft = tiny_draft()
    run(draft, tiny_batch, LossConfig(ce=0.0, tv=0.0, confidence=1.0))["loss"].backward()
    assert draft.markov_head is not None
    assert draft.markov_head.markov_w2.weight.grad is not None
    assert not draft.markov_head.markov_w2.weight.grad.any()  # reachable only through the label


def test_tau_multiplies_acceptance_along_a_block() -> None:
    slots = torch.tensor([0, 1, 2, 3])  # all of the first block, the first of the second
    accept = torch.tensor([0.5, 0.4, 1.0, 0.25])
    sums = acceptance_sums(accept, slots, torch.tensor([[True, True, False]]), 3)
    assert sums["expected_accepted"].item() == pytest.approx(0.5 + 0.2 + 0.2 + 0.25)
    assert sums["slots"].tolist() == [2, 1, 1]
    assert sums["accept"].tolist() == pytest.approx([0.75, 0.4, 1.0])
    metrics = summarize(sums | {"weight_sum": torch.tensor(1.0)})
    assert metrics["tau"] == pytest.approx(1 + 1.15 / 2)
    assert metrics["accept_rate@1"] == pytest.approx(0.375)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("switch", ["checkpointing", "compiling"])
def test_speed_switches_change_nothing(
    tiny_draft: MakeDraft, tiny_batch: TinyBatch, variant: dict[str, Any], switch: str
) -> None:
    draft = tiny_draft(**variant).train()
    plain = run(draft, tiny_batch)["loss"]
    plain.backward()
    expected = gradients(draft)
    if switch == "checkpointing":
        draft.checkpoint_activations = True
    else:
        draft.compile_layers(backend="aot_eager")  # what inductor is given; its own C++ takes a minute
    for batch in (tiny_batch, tiny_batch.packed()):
        loss = run(draft, batch)["loss"]
        loss.backward()
        torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
        for name, gradient in gradients(draft).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)

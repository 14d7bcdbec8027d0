"""Losses, labels, metrics and gradients against the reference implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Golden, positions_of
from torch import Tensor

from deepspec.config import LossConfig
from deepspec.training import objective
from deepspec.training.anchors import SlotLabels, supervise
from deepspec.training.metrics import acceptance_sums, summarize
from deepspec.training.objective import DraftTrainingModule


def loss_config(golden: Golden) -> LossConfig:
    arguments = golden.record["loss_args"]
    return LossConfig(
        ce=arguments["ce_loss_alpha"],
        tv=arguments["l1_loss_alpha"],
        confidence=arguments["confidence_head_alpha"],
        decay=arguments["loss_decay_gamma"],
    )


def labels_of(golden: Golden) -> SlotLabels:
    inputs = golden.inputs
    return supervise(
        inputs["input_ids"],
        positions_of(golden),
        inputs["loss_mask"].bool(),
        inputs["anchor_positions"],
        inputs["block_keep_mask"],
        7,
        loss_config(golden).decay,
    )


def sums_of(golden: Golden, with_metrics: bool = True) -> dict[str, Tensor]:
    inputs = golden.inputs
    return DraftTrainingModule(golden.draft, loss_config(golden))(
        inputs["input_ids"],
        positions_of(golden),
        inputs["anchor_positions"],
        inputs["block_keep_mask"],
        **vars(labels_of(golden)),
        context_features=inputs["target_hidden_states"],
        final_features=inputs["target_last_hidden_states"],
        with_metrics=with_metrics,
    )


def test_labels_are_exact(golden: Golden) -> None:
    labels, outputs = labels_of(golden), golden.outputs
    supervised = outputs["eval_mask"]
    assert torch.equal(labels.slots, supervised.flatten().nonzero().squeeze(1))
    assert torch.equal(labels.targets, outputs["target_ids"][supervised])
    torch.testing.assert_close(labels.weights, outputs["loss_weight_mask"][supervised], rtol=1e-6, atol=0)


def test_losses_and_metrics(golden: Golden) -> None:
    metrics, record = summarize(sums_of(golden)), golden.record
    expected = {
        "loss": record["losses"]["total"],
        "ce": record["losses"]["ce"],
        "tv": record["losses"]["l1"],
        "tau": record["metrics"]["train/tau_probabilistic"],
    } | {f"accept_rate@{k}": record["metrics"][f"train/accept_rate@{k - 1}"] for k in range(1, 8)}
    if golden.draft.confidence_head is not None:
        expected["confidence_loss"] = record["losses"]["confidence"]
        expected["confidence_abs_error"] = record["metrics"]["train/confidence_abs_error"]
        expected["confidence_bias"] = record["metrics"]["train/confidence_bias"]
    assert metrics.keys() == expected.keys()
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_loss_terms_are_sums(golden: Golden) -> None:
    sums, terms = sums_of(golden), golden.record["loss_terms"]
    assert sums["weight_sum"].item() == pytest.approx(terms["ce_loss_den"], rel=1e-6)
    assert sums["ce"].item() == pytest.approx(terms["ce_loss_num"], rel=1e-5)
    assert sums["tv"].item() == pytest.approx(terms["l1_loss_num"], rel=1e-5)
    if golden.draft.confidence_head is not None:
        assert sums["confidence_loss"].item() == pytest.approx(terms["confidence_loss_num"], rel=1e-5)


def test_acceptance_of_every_slot(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(accept: Tensor, *others: Any) -> dict[str, Tensor]:
        seen.append(accept)
        return acceptance_sums(accept, *others)

    monkeypatch.setattr(objective, "acceptance_sums", spy)
    sums_of(golden)
    expected = golden.outputs["accept_rate"][golden.outputs["eval_mask"]]
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_metrics", [True, False])
def test_every_gradient(golden: Golden, with_metrics: bool) -> None:
    sums = sums_of(golden, with_metrics)
    (sums["loss"] / sums["weight_sum"]).backward()
    expected = {name.removeprefix("grad."): value for name, value in golden.outputs.items() if name.startswith("grad.")}
    trained = dict(golden.draft.trainable_parameters())
    assert trained.keys() == expected.keys()
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, f"{name}: {error}"
        norm = golden.record["grad_norms"][name]
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-4), name
    frozen = {name for name, norm in golden.record["grad_norms"].items() if norm is None}
    assert frozen == {name for name, parameter in golden.draft.named_parameters() if parameter.grad is None}

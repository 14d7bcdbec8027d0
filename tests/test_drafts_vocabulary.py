"""Drafts that can propose a part of the target's vocabulary: what is kept, saved, trained and proposed."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyBatch, tiny_draft_config
from decoding_world import generated, random_draft, random_target
from lossless_world import ACCEPTABLE, engine_of, p_values, sampled, tiny_target
from safetensors.torch import load_file, save_file
from training_world import assert_same_end, tiny_run

from deepspec.checkpoints import checkpoint_folder
from deepspec.config import ConfigError, LossConfig
from deepspec.data.dataset import ConversationDataset
from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine
from deepspec.drafts import DSparkModel, build_draft, load_draft
from deepspec.drafts.vocabulary import choose_tokens
from deepspec.targets import load_target, load_tokenizer
from deepspec.training import train
from deepspec.training.objective import DraftTrainingModule
from deepspec.training.setup import load_datasets

FILL_IN = {"algorithm": "dflash", "markov_rank": 0, "confidence_head": False, "sample_from_anchor": False}
KEPT = torch.tensor([0, 3, 4, 9, 17, 18, 30, 44, 59, 60])


def keeping(draft: DSparkModel, target: Any, kept: torch.Tensor) -> DSparkModel:
    draft.keep_tokens(kept)
    draft.tie_to_target(target)
    return draft


def test_the_most_used_tokens_and_all_special_ones_are_kept() -> None:
    counts = np.array([0, 5, 9, 5, 0, 5, 1, 0])
    assert choose_tokens(counts, {7, 0}, 4).tolist() == [0, 1, 2, 7]
    assert choose_tokens(counts, {7, 0}, 5).tolist() == [0, 1, 2, 3, 7]
    assert choose_tokens(counts, set(), 7).tolist() == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(ConfigError, match=r"draft.vocab_size=1: must be at least 2, the tokenizer's special tokens"):
        choose_tokens(counts, {7, 0}, 1)


def test_it_is_stored_as_engines_read_it(tmp_path: Path) -> None:
    target = random_target()
    draft = keeping(random_draft(target, draft_vocab_size=10), target, KEPT)
    draft.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["draft_vocab_size"] == 10
    assert stored["d2t"].dtype == torch.int64
    assert torch.equal(stored["d2t"] + torch.arange(10), KEPT)
    assert torch.equal(stored["t2d"], torch.isin(torch.arange(61), KEPT))
    shapes = {"lm_head": 10, "embed_tokens": 61, "markov_head.markov_w1": 61, "markov_head.markov_w2": 10}
    assert {name: len(stored[f"{name}.weight"]) for name in shapes} == shapes
    assert torch.equal(stored["lm_head.weight"], target.head_weight[KEPT])
    loaded = load_draft(tmp_path, target=target, dtype=torch.bfloat16)
    assert torch.equal(loaded.kept_tokens, KEPT)
    assert (loaded.d2t.dtype, loaded.t2d.dtype) == (torch.int64, torch.bool)
    assert torch.equal(loaded.row_ids(torch.arange(61))[KEPT], torch.arange(10))
    assert int((loaded.row_ids(torch.arange(61)) < 0).sum()) == 51
    without = {name: value for name, value in stored.items() if name not in ("lm_head.weight", "embed_tokens.weight")}
    save_file(without, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_draft(tmp_path, target=target).lm_head.weight, target.head_weight[KEPT])


@pytest.mark.parametrize("size", [None, 61, 99])
def test_the_whole_vocabulary_leaves_no_trace(size: int | None) -> None:
    config = tiny_draft_config(draft_vocab_size=size)
    assert not hasattr(config, "draft_vocab_size")
    draft = build_draft(config)
    assert not {"d2t", "t2d"} & draft.state_dict().keys()
    assert draft.kept_tokens is None


def test_a_map_of_another_form_is_refused(tmp_path: Path) -> None:
    target = random_target()
    keeping(random_draft(target, draft_vocab_size=10), target, KEPT).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored | {"d2t": KEPT.clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"d2t: i \+ d2t\[i\] must be tokens of the target, 0 to 60, .* not offsets"):
        load_draft(tmp_path)
    save_file(stored | {"t2d": ~stored["t2d"]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="t2d: does not name the tokens that d2t maps to"):
        load_draft(tmp_path)


@pytest.mark.parametrize("changes", [{}, {"markov_head_type": "rnn"}, FILL_IN])
def test_losses_are_over_the_targets_whole_distribution(tiny_batch: TinyBatch, changes: dict[str, Any]) -> None:
    target = random_target()
    draft = keeping(random_draft(target, draft_vocab_size=10, **changes), target, KEPT)
    inputs = tiny_batch.for_objective(draft.draft_length, 4.0)
    loss = LossConfig(ce=0.3, tv=0.7, confidence=0.0)
    sums = DraftTrainingModule(draft, loss, target.head_weight.detach())(**inputs)
    with torch.no_grad():
        hidden = draft(**tiny_batch.for_backbone())
        logits = draft.base_logits(hidden)
        if draft.markov_head is not None:
            logits = logits + draft.markov_head.bias(draft.markov_head.latents(inputs["prev_tokens"], hidden))
        wanted = (inputs["final_features"].flatten(0, 1)[inputs["sources"]] @ target.head_weight.T).softmax(-1)
    probabilities = draft.over_target(logits.flatten(0, 2)[inputs["slots"]].softmax(-1))
    assert probabilities.shape == wanted.shape
    l1 = (probabilities - wanted).abs().sum(-1)
    of_labels = probabilities.gather(1, inputs["targets"][:, None])[:, 0]
    known = torch.isin(inputs["targets"], KEPT)
    assert 0 < known.sum() < len(known)
    ce = torch.where(known, -of_labels.clamp(min=1e-30).log(), 0.0)
    torch.testing.assert_close(sums["loss"], (inputs["weights"] * (0.3 * ce + 0.7 * l1)).sum())
    torch.testing.assert_close(sums["accept"].sum(), (1 - l1 / 2).sum())
    torch.testing.assert_close((1 - l1 / 2), torch.minimum(probabilities, wanted).sum(-1))
    sums["loss"].backward()
    assert draft.fc.weight.grad.isfinite().all()
    assert "target_head" not in DraftTrainingModule(draft, loss, target.head_weight.detach()).state_dict()


@pytest.mark.parametrize("changes", [{}, {"markov_head_type": "gated"}, FILL_IN])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_text_is_the_targets(changes: dict[str, Any], penalty: float) -> None:
    target = random_target()
    kept = torch.arange(0, 61, 2)
    draft = keeping(random_draft(target, draft_vocab_size=31, **changes), target, kept)
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    engine = SpeculativeEngine(target, DSparkProposer(draft, target), slots=2, max_length=64)
    completions = engine.generate([Request(prompt, 20, repetition_penalty=penalty) for prompt in prompts])
    expected = [generated(target, prompt, 20, repetition_penalty=penalty) for prompt in prompts]
    assert [completion.output_ids for completion in completions] == expected


@cache
def tiny_pruned_draft(fill_in: bool) -> DSparkModel:
    """Of `tiny_target`, whose six tokens it knows four of; drafts two tokens a round."""
    shape = {"num_layers": 1, "block_size": 2, "target_layer_ids": (0, 1), "mask_token_id": 0, "markov_rank": 4}
    changes = FILL_IN | {"block_size": 3} if fill_in else {}
    draft = random_draft(tiny_target(), **(shape | changes), draft_vocab_size=4, seed=1, scale=0.5)
    return keeping(draft, tiny_target(), torch.tensor([0, 2, 3, 5]))


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(
    ("fill_in", "sampling"),
    [
        (False, {"temperature": 1.0}),
        (True, {"temperature": 0.7}),
        (False, {"temperature": 1.2, "top_k": 5, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 0.6}),
    ],
)
def test_sampled_text_follows_the_target(rule: str, fill_in: bool, sampling: dict[str, Any]) -> None:
    engine = engine_of(DSparkProposer(tiny_pruned_draft(fill_in), tiny_target()), verification=rule)
    completions = sampled(engine, sampling)
    values = p_values(completions, sampling)
    assert min(values) > ACCEPTABLE, values
    said = {token for completion in completions for token in completion.output_ids}
    assert said == set(range(6))


@pytest.fixture(scope="module")
def pruned_run(training_world: Path, in_temporary_folder: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pruned")
    return train(tiny_run(training_world, folder, draft={"vocab_size": 40}, steps=4))


def test_a_run_keeps_what_its_data_uses(training_world: Path, pruned_run: Any) -> None:
    draft = load_draft(pruned_run.checkpoint, target=load_target(str(training_world / "target")))
    tokenizer = load_tokenizer(str(training_world / "target"))
    dataset, _ = load_datasets(tiny_run(training_world, "unused"), tokenizer)
    counts = np.zeros(280, dtype=int)
    for index in range(len(dataset)):
        sample = dataset[index, 0]
        for token, is_supervised in zip(sample.input_ids, sample.loss_mask, strict=True):
            counts[token] += is_supervised
    assert np.array_equal(dataset.supervised_counts(280), counts)
    assert ConversationDataset(dataset.rows.select([5, 2])).supervised_counts(280).sum() < counts.sum()
    kept = draft.kept_tokens
    assert len(kept) == 40
    assert set(tokenizer.all_special_ids) <= set(kept.tolist())
    others = sorted(set(range(280)) - set(tokenizer.all_special_ids), key=lambda token: (-counts[token], token))
    free = 40 - len(set(tokenizer.all_special_ids))
    assert set(others[:free]) <= set(kept.tolist())
    assert 0 < pruned_run.metrics["accept_rate@1"] < 1


def test_it_resumes_exactly_and_is_a_start(training_world: Path, pruned_run: Any, tmp_path: Path) -> None:
    shutil.copytree(pruned_run.checkpoint.parents[1], tmp_path / "cut")
    shutil.rmtree(checkpoint_folder(tmp_path / "cut", 4))
    resumed = train(tiny_run(training_world, tmp_path / "cut", draft={"vocab_size": 40}, steps=4))
    assert_same_end(pruned_run.checkpoint, resumed.checkpoint)
    start = {"steps": 1, "lr": 0.0, "start_from": str(pruned_run.checkpoint)}
    after = train(tiny_run(training_world, tmp_path / "next", **start))
    before, weights = (load_file(run.checkpoint / "draft" / "model.safetensors") for run in (pruned_run, after))
    assert before.keys() == weights.keys()
    assert all(torch.equal(before[name], weights[name]) for name in before)
    with pytest.raises(ConfigError, match=r"draft.vocab_size is 50, the draft has 40. Give draft.vocab_size=40"):
        train(tiny_run(training_world, tmp_path / "other", draft={"vocab_size": 50}, **start))

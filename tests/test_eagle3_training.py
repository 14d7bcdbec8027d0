"""The training loop with an Eagle3 draft: one run end to end, other splits, a resume, cached features, a warm start."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from cache_world import write_cache
from training_world import assert_same_end, changed, tiny_run

import deepspec
from deepspec.checkpoints import checkpoint_folder
from deepspec.config import ConfigError, validate
from deepspec.decoding import Request, SpeculativeEngine, proposer_of
from deepspec.targets import load_target
from deepspec.training import train
from deepspec.training.log import read_metrics

pytestmark = pytest.mark.usefixtures("in_temporary_folder")

EAGLE3 = {
    "algorithm": "eagle3",
    "architecture": "Qwen3Eagle3Model",
    "num_layers": 1,
    "ttt_length": 3,
    "target_layer_ids": None,
    "markov_rank": 0,
    "confidence_head": False,
}


def run_of(world, folder, *, draft=None, loss=None, **train_keys):
    run = tiny_run(world, folder, draft=EAGLE3 | (draft or {}), **train_keys)
    loss = {"ce": 1.0, "tv": 0.0, "confidence": 0.0} | (loss or {})
    run = changed(run, train={"loss": dataclasses.replace(run.train.loss, **loss)})
    validate(run)
    return run


@pytest.fixture(scope="module")
def finished(training_world, in_temporary_folder, tmp_path_factory):
    config = run_of(training_world, tmp_path_factory.mktemp("eagle3") / "run")
    return config, train(config)


def test_it_learns_and_decodes(finished):
    config, _ = finished
    rows = read_metrics(config.output_dir)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"ce", "tv", "tau", "accept_rate@1", "accept_rate@3", "eval/loss", "eval/tau"} <= rows[-1].keys()
    assert "accept_rate@4" not in rows[-1]
    target = load_target(config.target.path)
    draft = deepspec.load_draft(config.output_dir, target=target)
    assert (draft.algorithm, draft.draft_length, draft.target_layer_ids) == ("eagle3", 3, (0, 1, 2))
    assert (draft.config.step_loss_decay, draft.config.ttt_length) == (0.8, 3)
    assert torch.equal(draft.lm_head.weight, target.head_weight)
    engine = SpeculativeEngine(target, proposer_of(draft, target), max_length=40)
    plain = SpeculativeEngine(target, max_length=40)
    request = Request([5, 6, 7], 20)
    assert engine.generate([request])[0].output_ids == plain.generate([request])[0].output_ids


@pytest.mark.parametrize(
    "keys", [{"tokens_per_batch": 200}, {"micro_batch_size": 1}, {"activation_checkpointing": True}]
)
def test_the_split_changes_nothing(training_world, finished, tmp_path, keys):
    result = train(run_of(training_world, tmp_path / "run", **keys))
    for name in ("loss", "tau", "grad_norm", "eval/loss"):
        assert result.metrics[name] == pytest.approx(finished[1].metrics[name], rel=1e-4), name


def test_resume_is_exact(training_world, finished, tmp_path):
    config, result = finished
    shutil.copytree(config.output_dir, tmp_path / "run")
    shutil.rmtree(checkpoint_folder(tmp_path / "run", 6))
    assert_same_end(train(run_of(training_world, tmp_path / "run")).checkpoint, result.checkpoint)


def test_cached_features(training_world, finished, tmp_path):
    """The cache keeps final states of answers alone, and no chain asks for others."""
    run = run_of(training_world, tmp_path / "run")
    keys = {"source": "cached", "cache_dir": str(tmp_path / "cache"), "cache_dtype": "float32"}
    run = changed(run, features=keys)
    write_cache(run)
    assert train(run).metrics["loss"] == pytest.approx(finished[1].metrics["loss"], rel=1e-5)


def test_the_published_divisor_counts_every_token(training_world, finished, tmp_path):
    result = train(run_of(training_world, tmp_path / "run", loss={"divisor": "published"}, steps=1))
    first = read_metrics(finished[0].output_dir)[0]
    assert result.metrics["ce"] == pytest.approx(first["ce"], rel=1e-4)
    assert result.metrics["loss"] < 0.9 * first["loss"]
    assert result.metrics["supervised_weight"] % 2 == 0  # whole tokens, of two micro-batches of two rows each


def test_starts_from_an_earlier_one(training_world, finished, tmp_path):
    run = run_of(training_world, tmp_path / "run", start_from=finished[0].output_dir, steps=1)
    assert train(run).metrics["loss"] < 0.97 * read_metrics(finished[0].output_dir)[0]["loss"]
    other = run_of(training_world, tmp_path / "other", draft={"ttt_length": 2}, start_from=finished[0].output_dir)
    with pytest.raises(ConfigError, match=r"draft.ttt_length is 2, the draft has 3"):
        train(other)


def test_starting_from_the_target_is_refused(training_world, tmp_path):
    with pytest.raises(ConfigError, match=r"draft.start_from_target=true: an Eagle3 layer reads"):
        train(run_of(training_world, tmp_path / "run", draft={"start_from_target": True}))

"""The training loop in one process: what a step computes, what a run leaves behind."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from training_world import changed, draft_weights, is_timing, tiny_run

import deepspec
from deepspec.checkpoints import list_checkpoints, verify_checkpoint
from deepspec.config import ConfigError, WandbConfig
from deepspec.targets import load_target
from deepspec.training import train
from deepspec.training.log import read_metrics
from deepspec.training.meter import PARTS

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.fixture(scope="module")
def finished(training_world, in_temporary_folder, tmp_path_factory):
    """A finished run and its result."""
    config = tiny_run(training_world, tmp_path_factory.mktemp("run") / "out")
    return config, train(config)


def test_run_folder(finished, training_world):
    config, result = finished
    assert (result.status, result.step) == ("finished", 6)
    assert [folder.name for folder in list_checkpoints(config.output_dir)] == ["step-00000004", "step-00000006"]
    state = verify_checkpoint(result.checkpoint)
    assert (state["step"], state["steps"], state["world_size"], state["launcher"]) == (6, 6, 1, "one process")
    assert sorted(state["files"]) == [
        "draft/config.json",
        "draft/model.safetensors",
        "state/optimizer.safetensors",
    ]
    written = yaml.safe_load((result.checkpoint.parents[1] / "config.yaml").read_text())
    assert written["train"]["lr"] == 3e-3
    assert written["target"]["path"] == config.target.path


def test_result_loads_from_the_run_folder(finished, training_world):
    config, _ = finished
    target = load_target(config.target.path)
    draft = deepspec.load_draft(config.output_dir, target=target)
    assert torch.equal(draft.lm_head.weight, target.head_weight)
    assert torch.equal(draft.embed_tokens.weight, target.embedding_weight)
    assert draft.markov_head.markov_w2.weight.abs().max() > 0  # starts at 0, so it was trained


def test_metrics_rows(finished):
    config, result = finished
    rows = read_metrics(config.output_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    timings = {f"{name}_seconds" for name in ("step", *PARTS)}
    timings |= {"tokens_per_second", "anchors_per_second", "peak_memory_gib"}
    names = {"loss", "ce", "tv", "confidence_loss", "tau", "lr", "grad_norm", "epoch", *timings}
    names |= {f"accept_rate@{k}" for k in (1, 2, 3, 4)}
    for row in rows:
        assert names <= row.keys()
        expected = 0.1 * row["ce"] + 0.9 * row["tv"] + row["confidence_loss"]
        assert math.isclose(row["loss"], expected, rel_tol=1e-5)
        assert ("eval/tau" in row) == (row["step"] % 3 == 0)
        assert all(row[name] > 0 for name in timings)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["eval/loss"] < rows[2]["eval/loss"]
    assert [row["lr"] for row in rows[:2]] == [1.5e-3, 3e-3]
    assert result.metrics["loss"] == rows[-1]["loss"]


SPLITS = [
    {"micro_batch_size": 1},
    {"micro_batch_size": 4},
    {"tokens_per_batch": 64},
    {"tokens_per_batch": 1000},
    {"activation_checkpointing": True},
]


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: next(iter(split)))
def test_result_does_not_depend_on_the_split(finished, training_world, tmp_path, split, lookahead):
    config, result = finished
    other = train(changed(tiny_run(training_world, tmp_path, **split), features={"lookahead": lookahead}))
    for ours, theirs in zip(read_metrics(config.output_dir), read_metrics(tmp_path), strict=True):
        for name in (name for name in ours if not is_timing(name)):
            assert math.isclose(ours[name], theirs[name], rel_tol=2e-5, abs_tol=1e-6), (name, ours, theirs)
    ours, theirs = deepspec.load_draft(result.checkpoint), deepspec.load_draft(other.checkpoint)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=0), name


def test_parts_of_a_step_add_up(finished):
    config, _ = finished
    for row in read_metrics(config.output_dir):
        parts = sum(row[f"{part}_seconds"] for part in PARTS)
        assert 0.5 * row["step_seconds"] < parts <= row["step_seconds"]


def test_too_small_a_token_budget(training_world, tmp_path):
    with pytest.raises(ConfigError, match=r"train.tokens_per_batch=32: must be at least data.max_length=64"):
        train(tiny_run(training_world, tmp_path, tokens_per_batch=32))


def test_second_run_in_the_same_process(finished, training_world, tmp_path):
    """As `--multirun` does; equal settings give equal bytes, another seed gives others."""
    _, result = finished
    again = train(tiny_run(training_world, tmp_path / "again"))
    assert draft_weights(again.checkpoint) == draft_weights(result.checkpoint)
    config = tiny_run(training_world, tmp_path / "seed", draft={"markov_rank": 0, "confidence_head_with_markov": False})
    config.seed = 1
    other = train(config)
    assert draft_weights(other.checkpoint) != draft_weights(result.checkpoint)


def test_finished_run_is_left_alone(finished, capsys):
    config, result = finished
    discarded = result.checkpoint.with_name(".tmp-discarded-step-00000002")  # its last session died clearing up
    discarded.mkdir()
    before = draft_weights(result.checkpoint)
    again = train(config)
    assert (again.status, again.step, again.checkpoint) == ("already finished", 6, result.checkpoint)
    assert "already finished at step 6" in capsys.readouterr().out
    assert draft_weights(result.checkpoint) == before
    assert not discarded.exists()


def test_dflash_reads_no_target_logits_unless_logged(training_world, tmp_path):
    dflash = {"algorithm": "dflash", "markov_rank": 0, "confidence_head": False, "confidence_head_with_markov": False}
    config = tiny_run(training_world, tmp_path, draft=dflash, steps=2)
    config.train.loss.ce, config.train.loss.tv, config.train.loss.confidence = 1.0, 0.0, 0.0
    result = train(changed(config, logging={"log_steps": 2}))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2]
    assert math.isclose(rows[0]["loss"], rows[0]["ce"], rel_tol=1e-6)
    assert deepspec.load_draft(result.checkpoint).algorithm == "dflash"


def test_bf16_keeps_float32_weights_and_resumes_exactly(training_world, tmp_path):
    """Only what is the target's own, embedding and head, is stored in bf16."""
    run = changed(
        tiny_run(training_world, tmp_path / "run", steps=2, save_steps=1, mixed_precision="bf16"),
        target={"dtype": "bfloat16"},
    )
    whole = train(run)
    stored = load_file(whole.checkpoint / "draft" / "model.safetensors")
    in_bf16 = {name for name, value in stored.items() if value.dtype == torch.bfloat16}
    assert in_bf16 == {"embed_tokens.weight", "lm_head.weight"}
    assert {value.dtype for name, value in stored.items() if name not in in_bf16} == {torch.float32}
    weights = draft_weights(whole.checkpoint)
    shutil.rmtree(whole.checkpoint)
    assert draft_weights(train(run).checkpoint) == weights


def test_batch_that_cannot_be_split(training_world, tmp_path):
    with pytest.raises(ConfigError, match=r"global_batch_size=4: must be a multiple of train.micro_batch_size=3"):
        train(tiny_run(training_world, tmp_path, micro_batch_size=3))


@pytest.mark.parametrize("broken", ["init_trackers", "log", "finish"])
def test_wandb_failure_does_not_stop_training(training_world, tmp_path, monkeypatch, caplog, broken):
    class Tracker:
        def finish(self):
            if broken == "finish":
                fail()

    def fail(*args, **kwargs):
        raise ConnectionError("no route to host")

    def init_trackers(self, *args, **kwargs):
        self.trackers = [Tracker()]

    monkeypatch.setattr(Accelerator, "init_trackers", fail if broken == "init_trackers" else init_trackers)
    monkeypatch.setattr(Accelerator, "log", fail if broken == "log" else lambda *args, **kwargs: None)
    config = changed(tiny_run(training_world, tmp_path, steps=2), logging={"wandb": WandbConfig(mode="online")})
    assert train(config).status == "finished"
    assert caplog.text.count("wandb stopped working and is off for the rest of this run: no route to host") == 1
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]

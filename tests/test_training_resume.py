"""Runs that are stopped, damaged or changed, and what the same command then does."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_world import assert_same_end, changed, draft_weights, tiny_run, tuned_target

from deepspec.checkpoints import CheckpointError, checkpoint_folder, list_checkpoints, newest_checkpoint
from deepspec.config import ConfigError, WandbConfig
from deepspec.files import sha256_of
from deepspec.training import train
from deepspec.training.interrupt import StopRequest
from deepspec.training.log import read_metrics
from deepspec.training.report import Reporter

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.fixture(scope="module")
def uninterrupted(training_world, in_temporary_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return train(tiny_run(training_world, folder))


def copy_of(result, tmp_path):
    """The finished run as it was at step 4: its newest checkpoint is gone."""
    shutil.copytree(result.checkpoint.parents[1], tmp_path / "run")
    shutil.rmtree(checkpoint_folder(tmp_path / "run", 6))
    return tmp_path / "run"


def test_continues_with_another_split_and_other_free_settings(training_world, uninterrupted, tmp_path, capsys):
    run = copy_of(uninterrupted, tmp_path)
    config = tiny_run(training_world, run, micro_batch_size=4, keep_checkpoints=1)
    result = train(changed(config, logging={"log_steps": 3}))
    assert f"continuing from {checkpoint_folder(run, 4)}: 2 of 6 steps" in capsys.readouterr().out
    assert result.metrics["loss"] == pytest.approx(uninterrupted.metrics["loss"], rel=1e-5)
    assert [folder.name for folder in list_checkpoints(run)] == ["step-00000006"]


def test_another_split_is_announced(training_world, uninterrupted, tmp_path, caplog):
    run = copy_of(uninterrupted, tmp_path)
    train(tiny_run(training_world, run, micro_batch_size=1))
    before = "one process on 1 rank with train.micro_batch_size=2"
    assert f"{checkpoint_folder(run, 4)} was written by {before}, and this is one process on 1 rank" in caplog.text
    assert "every step keeps its samples and anchors, but gradients are summed in another order" in caplog.text


def test_no_random_state_to_save(training_world, uninterrupted, tmp_path, monkeypatch):
    """Checkpoints hold none because training draws nothing from the global generators: their state changes no byte."""
    step = Reporter.step

    def disturb(self, done, loss, row):
        step(self, done, loss, row)
        torch.manual_seed(done)
        random.seed(done)
        np.random.seed(done)

    torch.manual_seed(17)
    monkeypatch.setattr(Reporter, "step", disturb)
    assert_same_end(train(tiny_run(training_world, tmp_path / "run")).checkpoint, uninterrupted.checkpoint)


def test_checkpoint_with_another_optimizer_state(training_world, uninterrupted, tmp_path):
    """A file that was written before state/ had this form, or of other parameters, is refused by name."""
    run = copy_of(uninterrupted, tmp_path)
    file = checkpoint_folder(run, 4) / "state" / "optimizer.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, file, {"updates": "4"})
    record_again(checkpoint_folder(run, 4), file)
    with pytest.raises(CheckpointError, match=rf"{file}: not the optimizer state of this draft \(.*{name}"):
        train(tiny_run(training_world, run))


def record_again(checkpoint, file):
    """As if `file` had been written like this."""
    state_file = checkpoint / "trainer_state.json"
    state = json.loads(state_file.read_text())
    entry = {"size": file.stat().st_size, "sha256": sha256_of(file)}
    state["files"][file.relative_to(checkpoint).as_posix()] = entry
    state_file.write_text(json.dumps(state))


def test_explicit_checkpoint(training_world, uninterrupted, tmp_path):
    run = copy_of(uninterrupted, tmp_path)
    named = str(checkpoint_folder(run, 4))
    result = train(tiny_run(training_world, tmp_path / "elsewhere", resume=named))
    assert draft_weights(result.checkpoint) == draft_weights(uninterrupted.checkpoint)
    assert [row["step"] for row in read_metrics(tmp_path / "elsewhere")] == [5, 6]


def test_explicit_checkpoint_that_is_no_folder(training_world, tmp_path):
    with pytest.raises(ConfigError, match=r"train.resume=latest: must be auto, never, or an existing"):
        train(tiny_run(training_world, tmp_path, resume="latest"))


def test_damaged_newest_falls_back_and_ends_the_same(training_world, uninterrupted, tmp_path, caplog):
    shutil.copytree(uninterrupted.checkpoint.parents[1], tmp_path / "run")
    damaged = checkpoint_folder(tmp_path / "run", 6) / "draft" / "model.safetensors"
    os.truncate(damaged, 1000)
    result = train(tiny_run(training_world, tmp_path / "run"))
    assert f"{damaged}: has 1000 bytes" in caplog.text
    assert "falling back to the checkpoint before it" in caplog.text
    assert_same_end(result.checkpoint, uninterrupted.checkpoint)


def test_no_valid_checkpoint_starts_from_scratch(training_world, uninterrupted, tmp_path, caplog, capsys):
    run = copy_of(uninterrupted, tmp_path)
    (checkpoint_folder(run, 4) / "state" / "optimizer.safetensors").unlink()
    result = train(tiny_run(training_world, run))
    assert f"no checkpoint in {run} is valid: training starts from scratch" in caplog.text
    assert "starting from scratch: 6 of 6 steps" in capsys.readouterr().out
    assert_same_end(result.checkpoint, uninterrupted.checkpoint)


def test_changed_settings_are_refused(training_world, uninterrupted, tmp_path):
    run = copy_of(uninterrupted, tmp_path)
    config = tiny_run(training_world, run, lr=1e-3, draft={"block_size": 5})
    config.seed = 4
    with pytest.raises(ConfigError) as error:
        train(config)
    message = str(error.value)
    for expected in (
        f"{checkpoint_folder(run, 4)} was written by a run with other settings",
        "train.lr: was 0.003, is now 0.001",
        "draft.block_size: was 4, is now 5",
        "seed: was 0, is now 4",
        f"train.start_from={checkpoint_folder(run, 4) / 'draft'}",
        "train.resume=never",
    ):
        assert expected in message
    assert message.count(": was ") == 3


def test_changed_data_are_refused(training_world, uninterrupted, tmp_path):
    run = copy_of(uninterrupted, tmp_path)
    file = training_world / "train.jsonl"
    original = file.read_text()
    try:
        file.write_text(original.replace("What is 3", "What is  3"))
        with pytest.raises(ConfigError, match=r"content of data.train_files \(SHA-256\): was \[\"\w{12}\.\.\.\"\], is"):
            train(tiny_run(training_world, run))
    finally:
        file.write_text(original)


def test_moved_target_and_data_continue_to_the_bit(training_world, uninterrupted, tmp_path):
    run = copy_of(uninterrupted, tmp_path)
    shutil.copytree(training_world / "target", tmp_path / "elsewhere")
    shutil.copy(training_world / "train.jsonl", tmp_path / "renamed.jsonl")
    config = changed(
        tiny_run(training_world, run),
        target={"path": str(tmp_path / "elsewhere")},
        data={"train_files": [str(tmp_path / "renamed.jsonl")]},
    )
    result = train(config)
    assert_same_end(result.checkpoint, uninterrupted.checkpoint)
    written = json.loads((result.checkpoint / "draft" / "config.json").read_text())
    assert written["target_model_name_or_path"] == str(tmp_path / "elsewhere")


def test_order_of_the_data_files_counts(training_world, tmp_path):
    lines = (training_world / "train.jsonl").read_text().splitlines(keepends=True)
    halves = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for half, part in zip(halves, (lines[:10], lines[10:]), strict=True):
        half.write_text("".join(part))
    config = changed(tiny_run(training_world, tmp_path / "run"), data={"train_files": list(map(str, halves))})
    train(config)
    config.data.train_files.reverse()
    with pytest.raises(ConfigError, match=r"content of data\.train_files"):
        train(config)


def test_other_target_weights_are_refused(training_world, uninterrupted, tmp_path):
    run = copy_of(uninterrupted, tmp_path)
    config = changed(tiny_run(training_world, run), target={"path": tuned_target(training_world, tmp_path)})
    with pytest.raises(ConfigError) as error:
        train(config)
    assert re.search(r"weights of the target \(fingerprint\): was \"\w{12}\.\.\.\", is now", str(error.value))
    assert f"train.start_from={checkpoint_folder(run, 4) / 'draft'}" in str(error.value)


def test_more_steps_go_on_and_the_new_schedule_is_told(training_world, uninterrupted, tmp_path, caplog):
    run = shutil.copytree(uninterrupted.checkpoint.parents[1], tmp_path / "run")
    result = train(tiny_run(training_world, run, steps=9))
    assert (result.status, result.step) == ("finished", 9)
    told = [record.message for record in caplog.records if "instead of" in record.message]
    rate = read_metrics(run)[6]["lr"]
    assert told == [
        "train.steps=9: 9 steps instead of 6; from step 7 on the learning rate follows the new schedule and is "
        f"{rate:.2e} there instead of 0.00e+00"
    ]
    assert train(tiny_run(training_world, run, steps=9)).status == "already finished"


def test_more_epochs_go_on(training_world, tmp_path):
    config = tiny_run(training_world, tmp_path / "run", steps=None, epochs=1.0)
    assert train(config).step == 4
    config.train.epochs = 1.5
    assert train(config).step == 6


def test_fewer_steps_than_done_leave_the_run_as_it_is(training_world, uninterrupted, tmp_path, caplog):
    run = copy_of(uninterrupted, tmp_path)
    result = train(tiny_run(training_world, run, steps=3))
    assert (result.status, result.step) == ("already finished", 4)
    assert "train.steps=3: asks for 3 steps, but 4 are done" in caplog.text
    assert train(tiny_run(training_world, run, steps=4)).status == "already finished"


def test_a_draft_folder_cannot_be_continued(training_world, uninterrupted, tmp_path):
    draft = str(uninterrupted.checkpoint / "draft")
    with pytest.raises(ConfigError, match=rf"cannot be continued; begin a new run .* by train.start_from={draft}"):
        train(tiny_run(training_world, tmp_path, resume=draft))


def test_never_refuses_to_overwrite(training_world, uninterrupted):
    run = uninterrupted.checkpoint.parents[1]
    with pytest.raises(ConfigError, match=r"train.resume=never, but .* already holds checkpoints up to step-00000006"):
        train(tiny_run(training_world, run, resume="never"))


def train_until_step_3(config, monkeypatch, signum=signal.SIGTERM):
    step = Reporter.step

    def give_notice(self, done, loss, row):
        step(self, done, loss, row)
        if done == 3:
            os.kill(os.getpid(), signum)

    with monkeypatch.context() as patched:
        patched.setattr(Reporter, "step", give_notice)
        return train(config)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_preemption_saves_and_the_same_command_continues(training_world, uninterrupted, tmp_path, monkeypatch, signum):
    config = tiny_run(training_world, tmp_path / "run")
    result = train_until_step_3(config, monkeypatch, signum)
    assert (result.status, result.step) == ("stopped", 3)
    assert newest_checkpoint(tmp_path / "run") == result.checkpoint
    assert signal.getsignal(signum) == signal.SIG_DFL
    assert_same_end(train(config).checkpoint, uninterrupted.checkpoint)


def test_wandb_run_survives_a_resume_and_is_kept_for_a_later_upload(training_world, tmp_path, monkeypatch):
    """`wandb sync` uploads both sessions into one run: they have one id and hold metrics."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config = changed(tiny_run(training_world, tmp_path / "run"), logging={"wandb": WandbConfig(mode="offline")})
    train_until_step_3(config, monkeypatch)
    run_id = (tmp_path / "run" / "wandb_run_id").read_text()
    assert len(run_id) == 12
    time.sleep(1)  # folders of offline runs are named by the second
    assert train(config).status == "finished"
    assert (tmp_path / "run" / "wandb_run_id").read_text() == run_id
    sessions = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2
    for session in sessions:
        assert session.name.endswith(f"-{run_id}")
        assert b"eval/loss" in (session / f"run-{run_id}.wandb").read_bytes()


def test_stop_request_restores_the_handler():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) == before

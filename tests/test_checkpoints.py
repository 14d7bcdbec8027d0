"""Checkpoint folders: whole or absent, verified, rotated."""

from __future__ import annotations

import errno
import json
import os

import pytest

from deepspec.checkpoints import (
    CheckpointError,
    checkpoint_folder,
    list_checkpoints,
    newest_checkpoint,
    read_trainer_state,
    rotate,
    verify_checkpoint,
    write_checkpoint,
)


def write_files(folder):
    for name, text in (
        ("draft/config.json", "{}"),
        ("draft/model.safetensors", "weights"),
        ("state/optimizer.bin", "m v"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def run(tmp_path):
    """A run folder with the checkpoints of steps 2 and 4."""
    for step in (2, 4):
        write_checkpoint(tmp_path, step, write_files, {"seed": 7})
    return tmp_path


def test_written_checkpoint_is_complete(run):
    folder = checkpoint_folder(run, 4)
    assert newest_checkpoint(run) == folder
    state = verify_checkpoint(folder)
    assert (state["step"], state["seed"]) == (4, 7)
    assert sorted(state["files"]) == ["draft/config.json", "draft/model.safetensors", "state/optimizer.bin"]
    assert state["files"]["draft/model.safetensors"]["size"] == 7
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: os.truncate(file, 3), "model.safetensors: has 3 bytes, but 7 were written"),
        (lambda file: file.write_text("WEIGHTS"), "model.safetensors: its content differs from what was written"),
        (lambda file: file.unlink(), "model.safetensors: missing"),
        (lambda file: (file.parents[1] / "trainer_state.json").unlink(), "trainer_state.json: missing, so this is not"),
        (lambda file: (file.parents[1] / "trainer_state.json").write_text('{"step": '), "trainer_state.json: damaged"),
        (lambda file: (file.parents[1] / "trainer_state.json").write_text("{}"), "no step or no list of files"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(run, caplog, damage, message):
    folder = checkpoint_folder(run, 4)
    damage(folder / "draft" / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        verify_checkpoint(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)
    assert newest_checkpoint(run) == checkpoint_folder(run, 2)
    assert message in caplog.text
    assert "falling back to the checkpoint before it" in caplog.text


def test_reading_a_draft_does_not_hash_the_optimizer(run):
    (checkpoint_folder(run, 4) / "state" / "optimizer.bin").write_text("M V")
    assert newest_checkpoint(run) == checkpoint_folder(run, 4)
    assert newest_checkpoint(run, subfolder="") == checkpoint_folder(run, 2)


def test_nothing_valid(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert list_checkpoints(tmp_path / "absent") == []
    checkpoint_folder(tmp_path, 2).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) is None


def test_rotation_keeps_the_newest(run):
    write_checkpoint(run, 10, write_files, {})
    rotate(run, 2, newest_step=10)
    assert [folder.name for folder in list_checkpoints(run)] == ["step-00000004", "step-00000010"]


def test_rotation_drops_what_a_fallback_left_ahead(run):
    write_checkpoint(run, 3, write_files, {})
    rotate(run, 1, newest_step=3)
    assert [folder.name for folder in list_checkpoints(run)] == ["step-00000003"]
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_rewriting_a_damaged_checkpoint(run):
    (checkpoint_folder(run, 4) / "draft" / "model.safetensors").unlink()
    write_checkpoint(run, 4, write_files, {"seed": 8})
    assert verify_checkpoint(checkpoint_folder(run, 4))["seed"] == 8


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_full_disk(run, error):
    def write(folder):
        write_files(folder)
        raise error

    with pytest.raises(CheckpointError) as raised:
        write_checkpoint(run, 6, write, {})
    message = str(raised.value)
    assert f"could not write the checkpoint {checkpoint_folder(run, 6)}" in message
    assert str(error) in message
    assert "MiB are free there; the checkpoint before, step-00000004, is untouched" in message
    assert "give the same command again" in message
    assert newest_checkpoint(run, subfolder="") == checkpoint_folder(run, 4)
    assert len(list((run / "checkpoints").iterdir())) == 2, "the unfinished folder takes up space"


def test_unwritable_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"could not write the checkpoint .*there is no earlier checkpoint"):
        write_checkpoint(tmp_path, 2, write_files, {})


def test_what_a_killed_run_left_is_removed(run):
    leftover = run / "checkpoints" / ".tmp-step-00000006"
    leftover.mkdir()
    (leftover / "half").write_text("half")
    assert newest_checkpoint(run) == checkpoint_folder(run, 4)
    write_checkpoint(run, 8, write_files, {})
    assert not leftover.exists()


def test_only_the_main_rank_describes(tmp_path):
    calls = []

    def rank(is_main):
        return write_checkpoint(
            tmp_path, 2, lambda folder: calls.append("write"), {}, is_main=is_main, barrier=lambda: calls.append("wait")
        )

    rank(False)
    assert calls == ["wait", "write", "wait", "wait"]
    assert list_checkpoints(tmp_path) == []
    assert read_trainer_state(rank(True))["step"] == 2
    json.loads((checkpoint_folder(tmp_path, 2) / "trainer_state.json").read_text())

"""Files written whole or not at all, and what killed writers leave behind."""

from __future__ import annotations

import os

import pytest

from deepspec.files import remove_unfinished, unfinished_name, write_atomically


@pytest.fixture
def file(tmp_path):
    """Whose writer was killed, beside another one whose writer was."""
    path = tmp_path / "metrics.json"
    path.write_text("old")
    unfinished_name(path).write_text("o")
    unfinished_name(tmp_path / "metrics.jsonl").write_text("{")
    return path


def leftovers(file):
    return sorted(path.name.split(".")[1:3] for path in file.parent.glob(".*"))


def test_the_next_writer_removes_what_a_killed_one_left(file):
    write_atomically(file, "new")
    assert file.read_text() == "new"
    assert leftovers(file) == [["metrics", "jsonl"]]


def test_what_others_may_be_writing_is_left_alone(file):
    write_atomically(file, "new", shared=True)
    assert file.read_text() == "new"
    remove_unfinished(file, older_than=3600)
    assert leftovers(file) == [["metrics", "json"], ["metrics", "jsonl"]]
    for path in file.parent.glob(".*"):
        os.utime(path, (0, 0))
    remove_unfinished(file, older_than=3600)
    assert leftovers(file) == [["metrics", "jsonl"]]


def test_a_write_that_fails_leaves_the_old_file_alone(file, monkeypatch):
    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert leftovers(file) == [["metrics", "jsonl"]]

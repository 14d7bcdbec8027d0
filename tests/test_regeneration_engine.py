"""Regeneration in this process: the same rows in any batch, with a draft, on other ranks, after an interruption."""

from __future__ import annotations

from collections import Counter
from contextlib import closing

import pytest
import torch
from decoding_world import random_draft
from regeneration_world import (
    Scripted,
    assistant,
    left_out,
    options_for,
    saved_rows,
    user,
    write_prompts,
    write_rows,
)

from deepspec.arguments import parse_arguments
from deepspec.config import ConfigError
from deepspec.data.formats import read_conversations
from deepspec.regeneration import regenerate as regeneration
from deepspec.regeneration.regenerate import RegenerateOptions, regenerate
from deepspec.regeneration.writer import Answer, Refusal
from deepspec.targets import load_target


def by_id(folder) -> dict[str, dict]:
    rows = saved_rows(folder)
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small wait for their threads longer than they compute, where the processor has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def prompts(tmp_path):
    return write_prompts(tmp_path / "prompts.jsonl", 7)


@pytest.fixture
def run(training_world, tmp_path, prompts):
    """`run("folder", **options)`: the rows there after a run, by id."""

    def make(name: str, files=None, **changes) -> dict[str, dict]:
        regenerate(options_for(training_world, tmp_path / name, files or [prompts], **changes))
        return by_id(tmp_path / name)

    return make


def test_rows_do_not_depend_on_the_batch(run, capsys):
    alone, together = run("alone", batch_size=1), run("together", batch_size=7)
    assert alone == together
    assert sorted(alone) == [f"row{i}" for i in range(7)]
    assert len({row["messages"][-1]["raw"] for row in alone.values()}) > 4
    row = alone["row0"]
    assert row["messages"][:-1] == [user("What is 0 + 1?")]
    assert row["finish_reason"] == row["messages"][-1]["finish_reason"]
    assert row["target"].startswith("target@")
    assert "7 rows" in capsys.readouterr().out


def test_the_folder_is_data(run, tmp_path):
    rows = run("out")
    read = list(read_conversations([str(tmp_path / "out")]))
    assert {each.id: each.messages for each in read} == {id: row["messages"] for id, row in rows.items()}


def test_several_answers_and_more_of_them_later(run):
    two = run("out", answers=2)
    assert sorted(two) == sorted(f"row{i}#{k}" for i in range(7) for k in (1, 2))
    assert two["row0#1"]["messages"][-1] != two["row0#2"]["messages"][-1]
    three = run("out", answers=3)
    assert len(three) == 21
    assert two.items() <= three.items()
    with pytest.raises(ConfigError, match="answers=several"):
        run("out", answers=1)


def test_more_prompts_in_another_order_go_on(run, tmp_path, capsys):
    few = run("out", files=[write_prompts(tmp_path / "few.jsonl", 3)])
    more = write_rows(tmp_path / "more.jsonl", [{"id": "row1", "messages": [user("Something else?")]}])
    all_rows = run("out", files=[more, write_prompts(tmp_path / "all.jsonl", 5)])
    assert few.items() <= all_rows.items()
    assert len(all_rows) == 6
    said = capsys.readouterr().out
    assert "6 prompts; 3 are done; 1 with the id of another prompt" in said


def test_a_draft_changes_no_greedy_answer(run, training_world, tmp_path):
    draft = random_draft(load_target(str(training_world / "target")), mask_token_id=3, target_layer_ids=[0, 1, 2])
    draft.save_pretrained(tmp_path / "draft")
    plain = run("plain", temperature=0.0)
    assert run("drafted", temperature=0.0, draft=str(tmp_path / "draft")) == plain


def test_prompts_that_do_not_fit_are_refused(run, tmp_path, capsys):
    rows = [{"id": "long", "messages": [user("word " * 200)]}, {"id": "short", "messages": [user("Hi")]}]
    rows.append({"id": "none", "messages": [{"role": "system", "content": "S"}]})
    rows.append({"id": "two", "messages": [user("Hi"), assistant("old"), user("word " * 200)]})
    kept = run("out", files=[write_rows(tmp_path / "rows.jsonl", rows)], max_new_tokens=1)
    assert sorted(kept) == ["short", "two"]
    reasons = {row["id"]: row["detail"] for row in left_out(tmp_path / "out")}
    assert "128 positions" in reasons["long"]
    assert "no turn of a user" in reasons["none"]
    assert "2 refused" in capsys.readouterr().out


def scripted_run(training_world, folder, monkeypatch, files, texts, **changes) -> Counter[str]:
    monkeypatch.setattr(regeneration, "open_writer", lambda *_: Scripted(texts))
    return regenerate(options_for(training_world, folder, files, **changes))


def test_cut_rows_are_dropped_but_done(training_world, tmp_path, monkeypatch, prompts):
    def texts(question):
        return Answer("x" * 5, 5, "length") if question.key == "row2" else Answer("x<|im_end|>", 2, "stop")

    for expected in (6, 0):
        counts = scripted_run(training_world, tmp_path / "out", monkeypatch, [prompts], texts, on_cut="drop")
        assert counts["rows"] == expected
    assert "row2" not in by_id(tmp_path / "out")
    assert [row["reason"] for row in left_out(tmp_path / "out")] == ["cut"]


def test_a_later_turn_that_cannot_be_asked_ends_the_conversation_before_it(training_world, tmp_path, monkeypatch):
    def texts(question):
        return Refusal("too long") if len(question.messages) > 1 else Answer("x<|im_end|>", 2, "stop")

    files = [write_rows(tmp_path / "p.jsonl", [{"id": "a", "messages": [user("1"), user("2")]}])]
    counts = scripted_run(training_world, tmp_path / "out", monkeypatch, files, texts)
    assert (counts["rows"], counts["shortened"]) == (1, 1)
    assert [m["content"] for m in by_id(tmp_path / "out")["a"]["messages"]] == ["1", "x"]


def test_interrupted_rows_are_written_by_other_ranks(training_world, tmp_path, monkeypatch, prompts):
    whole = options_for(training_world, tmp_path / "whole", [prompts])
    regenerate(whole)
    real = regeneration.open_writer

    class Interrupted:
        def __init__(self, writer):
            self.writer, self.steps = writer, 0

        def wait(self):
            self.steps += 1
            if self.steps > 14:
                raise KeyboardInterrupt
            return self.writer.wait()

        def __getattr__(self, name):
            return getattr(self.writer, name)

    monkeypatch.setattr(regeneration, "open_writer", lambda *args: Interrupted(real(*args)))
    options = options_for(training_world, tmp_path / "out", [prompts], batch_size=2)
    with pytest.raises(SystemExit):
        regenerate(options)
    first = len(by_id(tmp_path / "out"))
    assert 0 < first < 7
    monkeypatch.setattr(regeneration, "open_writer", real)
    for rank in range(2):  # ranks one after the other; each reads what was there before the run
        write_share(options, rank, first)
    assert by_id(tmp_path / "out") == by_id(tmp_path / "whole")


def write_share(options: RegenerateOptions, rank: int, known_rows: int) -> None:
    """What rank `rank` of 2 does, with the rows that the interrupted run has left."""
    from deepspec.regeneration.setup import know_target
    from deepspec.regeneration.store import RowStore, done_rows
    from deepspec.regeneration.tasks import share_of, tasks_of

    with closing(RowStore(options.output_dir, rank=rank)) as store:
        known, _ = done_rows(store)
        known = dict(list(known.items())[:known_rows])
        speaker = know_target(options)
        share = share_of(tasks_of(read_conversations(options.prompts), known, 1), known.__contains__, rank, 2)
        with closing(regeneration.open_writer(options, speaker, torch.device("cpu"), print)) as writer:
            run = regeneration.Regeneration(options, speaker, store, writer, Counter())
            run.work(share, lambda *_: None)


def test_keys_of_the_command_line():
    words = ["target.path=x", "prompts=[a.jsonl,b]", "output_dir=o"]
    options = parse_arguments(RegenerateOptions, [*words, "template_options={enable_thinking: false}"])
    assert (options.target.path, options.prompts) == ("x", ["a.jsonl", "b"])
    assert options.template_options == {"enable_thinking": False}
    options = parse_arguments(RegenerateOptions, [*words, "template_options.enable_thinking=false"])
    assert options.template_options == {"enable_thinking": False}
    for word, message in (
        ("target.pth=x", "unknown key 'target.pth'; .* Did you mean 'target.path'"),
        ("target=builtin", "target has keys of its own: target.path="),
        ("system_prompt=Note: be kind", "put quotes around a text with a colon"),
        ("prompts=a.jsonl", r"expected a list; write prompts=\[a.jsonl\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_arguments(RegenerateOptions, [*words, word])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_cut": "drp"}, "on_cut=drp: must be one of keep, drop. Did you mean 'drop'"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"urls": ["localhost:8000"]}, "must begin with http"),
        ({"answers": 0}, "answers=0: must be at least 1"),
        ({"answers": 2, "temperature": 0.0}, "answers=2: at temperature=0"),
        ({"max_length": 10**6}, "the target has 32768 positions"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
    ],
)
def test_bad_options(run, changes, message):
    with pytest.raises(ConfigError, match=message):
        run("out", **changes)

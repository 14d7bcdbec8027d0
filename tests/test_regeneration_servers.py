"""Regeneration with servers: what fails is asked again elsewhere, what is slow holds nobody, nothing is lost."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest
from regeneration_world import (
    END,
    StandIn,
    assistant,
    left_out,
    options_for,
    saved_rows,
    user,
    write_prompts,
    write_rows,
)

from deepspec.config import ConfigError
from deepspec.regeneration.regenerate import regenerate
from deepspec.regeneration.writer import WriterError, seed_of

QUICK = {"timeout": 20.0, "retry_for": 20.0}


@pytest.fixture
def run(training_world, tmp_path):
    """`run([StandIn, ...], prompts=12, **options)`: counts of a regeneration on these servers."""

    def make(stand_ins, prompts: int | str = 12, **changes):
        file = write_prompts(tmp_path / "prompts.jsonl", prompts) if isinstance(prompts, int) else prompts
        with ExitStack() as stack:
            urls = [
                stack.enter_context(each.running()).url if isinstance(each, StandIn) else each for each in stand_ins
            ]
            options = options_for(training_world, tmp_path / "out", [file], **(QUICK | {"urls": urls} | changes))
            return regenerate(options)

    return make


def assert_complete(tmp_path, count: int = 12) -> None:
    rows = saved_rows(tmp_path / "out")
    assert sorted(row["id"] for row in rows) == sorted(f"row{i}" for i in range(count))
    for row in rows:
        seed = seed_of(0, row["id"], 0) % 2**31
        assert row["messages"][-1]["raw"] == f"The seed is {seed}.{END}"
        assert row["messages"][-1]["content"] == f"The seed is {seed}."


def test_what_is_asked_and_saved(run, tmp_path, capsys):
    server = StandIn()
    counts = run([server], top_k=0, min_p=0.1, concurrency=3)
    assert counts["rows"] == 12
    assert_complete(tmp_path)
    body = server.bodies[0]
    assert (body["model"], body["top_k"], body["min_p"], body["temperature"]) == ("tiny", -1, 0.1, 0.7)
    switches = ("include_stop_str_in_output", "no_stop_trim", "skip_special_tokens")
    assert [body[name] for name in switches] == [True, True, False]
    assert all(isinstance(token, int) for token in body["prompt"])
    assert (body["max_tokens"], body["repetition_penalty"], len(body["stop_token_ids"])) == (12, 1.0, 1)
    assert server.most_under_way <= 3
    assert "12 rows, 60 tokens, 0 cut; 0 refused" in capsys.readouterr().out


@pytest.mark.parametrize("failure", ["500", "reset", "garbage", "half", "429", "503"])
def test_a_failed_request_is_asked_again(run, tmp_path, failure):
    server = StandIn(misbehave=lambda number, body: failure if number in (0, 4) else None)
    assert run([server])["rows"] == 12
    assert_complete(tmp_path)


@pytest.mark.parametrize("failure", ["500", "reset", "garbage"])
def test_another_server_answers_for_one_that_always_fails(run, tmp_path, failure):
    broken, sound = StandIn(misbehave=lambda number, body: failure), StandIn()
    assert run([broken, sound])["rows"] == 12
    assert_complete(tmp_path)
    assert len(sound.bodies) == 12


def test_a_server_that_is_not_there_holds_nobody(run, tmp_path):
    assert run(["http://127.0.0.1:9", StandIn()])["rows"] == 12
    assert_complete(tmp_path)


def test_a_stalled_server_does_not_hold_the_others(run, tmp_path):
    moments = []
    sound = StandIn(text_of=lambda body: moments.append(time.monotonic()) or StandIn.text_of(body))
    stalled = StandIn(misbehave=lambda number, body: "stall")
    started = time.monotonic()
    assert run([stalled, sound], concurrency=2, timeout=1.5)["rows"] == 12
    assert_complete(tmp_path)
    assert sum(moment - started < 1.4 for moment in moments) >= 10


def test_a_faster_server_gets_more(run, tmp_path):
    slow, fast = StandIn(seconds=0.25), StandIn(seconds=0.01)
    run([slow, fast], concurrency=1, prompts=24)
    assert_complete(tmp_path, 24)
    assert len(fast.bodies) > 2 * len(slow.bodies)


def test_a_row_that_a_server_refuses_is_listed_and_not_asked_again(run, tmp_path, capsys):
    bad = str(seed_of(0, "row3", 0) % 2**31)
    server = StandIn(misbehave=lambda number, body: "400" if str(body["seed"]) == bad else None)
    counts = run([server])
    assert (counts["rows"], counts["refused"]) == (11, 1)
    (row,) = left_out(tmp_path / "out")
    assert (row["id"], row["reason"]) == ("row3", "refused")
    assert "line 4" in row["place"]
    assert "so says 400" in row["detail"]
    again = StandIn()
    assert run([again])["rows"] == 0
    assert not again.bodies
    assert "1 of them left out (refused)" in capsys.readouterr().out


def test_a_row_at_which_servers_always_fail_is_left_for_the_next_run(run, tmp_path):
    bad = seed_of(0, "row3", 0) % 2**31
    server = StandIn(misbehave=lambda number, body: "500" if body["seed"] == bad else None)
    counts = run([server], retries=2)
    assert (counts["rows"], counts["failed"]) == (11, 1)
    assert run([StandIn()])["rows"] == 1
    assert_complete(tmp_path)


def test_everything_refused_is_a_mistake_of_the_run(run, tmp_path):
    with pytest.raises(ConfigError, match=r"the first 8 requests were all refused.*so says 400"):
        run([StandIn(misbehave=lambda number, body: "400")])
    assert run([StandIn()])["rows"] == 12  # none was lost


@pytest.mark.parametrize("failure", ["500", "stall"])
def test_without_any_server_the_run_ends_and_goes_on_later(run, tmp_path, failure):
    dying = StandIn(misbehave=lambda number, body: failure if number >= 5 else None)
    with pytest.raises(WriterError, match="no server of urls answered for 1 s"):
        run([dying, "http://127.0.0.1:9"], concurrency=1, retry_for=1.0, timeout=1.0)
    assert len(saved_rows(tmp_path / "out")) == 5
    assert run([StandIn()])["rows"] == 7
    assert_complete(tmp_path)


def test_one_clear_line_for_a_wrong_key_or_model(run, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="answered 401: Unauthorized; set OPENAI_API_KEY"):
        run([StandIn(key="secret")])
    with pytest.raises(ConfigError, match=r"model=tinny: .* does not have it; it has tiny. Did you mean 'tiny'"):
        run([StandIn()], model="tinny")
    with pytest.raises(ConfigError, match="has the models a, b; choose with model=NAME"):
        run([StandIn(models=("a", "b"))])
    with pytest.raises(ConfigError, match="does not exist"):
        run([StandIn(misbehave=lambda number, body: "unknown model")])
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert run([StandIn(key="secret", models=("a", "b"))], model="b")["rows"] == 12


def test_a_server_that_only_chats(run, tmp_path, capsys):
    message = {"content": "Hi.", "reasoning_content": "Hm.", "tool_calls": [{"function": {"name": "f"}}]}
    server = StandIn(chat_only=True, message_of=lambda body: message)
    run([server], prompts=2, template_options={"enable_thinking": False}, system_prompt="Be kind.")
    (row, _) = saved_rows(tmp_path / "out")
    assert row["messages"][-1] == {"role": "assistant", **message, "finish_reason": "stop"}
    assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": "Be kind."}
    said = capsys.readouterr().out
    assert said.count("has no /v1/completions: asking /v1/chat/completions") == 1


def test_turn_by_turn_with_the_answers_that_the_target_gave(run, tmp_path):
    turns = [user("One?"), assistant("old"), user("Two?"), assistant("older"), user("Three?")]
    server = StandIn(text_of=lambda body: f"turn {len(body['prompt'])}{END}")
    run([server], prompts=write_rows(tmp_path / "turns.jsonl", [{"id": "a", "messages": turns}]))
    (row,) = saved_rows(tmp_path / "out")
    assert [m["content"] for m in row["messages"] if m["role"] == "user"] == ["One?", "Two?", "Three?"]
    lengths = [len(body["prompt"]) for body in server.bodies]
    assert [m["content"] for m in row["messages"] if m["role"] == "assistant"] == [f"turn {n}" for n in lengths]
    assert len({body["seed"] for body in server.bodies}) == 3


def test_the_positions_of_a_server_bound_the_answer(run, tmp_path):
    server = StandIn(positions=40)
    run([server], prompts=2)
    assert all(len(body["prompt"]) + body["max_tokens"] <= 40 for body in server.bodies)


def test_an_end_that_the_server_has_cut_off_is_put_back(run, tmp_path):
    run([StandIn(text_of=lambda body: "Hi.", finish_reason="stop")], prompts=1)
    (row,) = saved_rows(tmp_path / "out")
    assert row["messages"][-1]["raw"] == f"Hi.{END}"
    assert row["messages"][-1]["content"] == "Hi."

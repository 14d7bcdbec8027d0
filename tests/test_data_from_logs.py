"""Request logs to training rows: shapes of logs, what is left out, and that no answer is trained on twice."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.from_logs import LogsOptions, is_held_out, main
from deepspec.config import ConfigError
from deepspec.data.chat import render_samples
from deepspec.data.jsonl import DataError
from deepspec.data.tokenizer import train_tokenizer

Row = dict[str, Any]
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello."}


def request(*messages: Row, **more: Any) -> Row:
    return {"model": "target", "messages": list(messages) or [HI], **more}


def response(content: Any = "Hello.", finish: str | None = "stop", **message: Any) -> Row:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {"id": "r", "object": "chat.completion", "model": "target", "choices": [choice], "usage": {}}


def logged(answer: str = "Hello.", *messages: Row, finish: str | None = "stop", **message: Any) -> Row:
    return {"request": request(*messages), "response": response(answer, finish, **message)}


def chunk(finish: str | None = None, index: int = 0, **delta: Any) -> Row:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return {"id": "r", "object": "chat.completion.chunk", "model": "target", "choices": [choice]}


def sse(*chunks: Row, done: bool = True) -> str:
    return "".join(f"data: {json.dumps(part)}\n\n" for part in chunks) + ("data: [DONE]\n\n" if done else "")


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., list[Row]]:
    """Rows of a log to rows to train on; none are held out."""

    def convert(*rows: Any, **options: Any) -> list[Row]:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")
        given = {"held_out_fraction": 0.0, "output_dir": str(tmp_path / "out")} | options
        main(LogsOptions([str(tmp_path / "log.jsonl")], **given))
        return [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]

    return convert


SHAPES: dict[str, list[Row]] = {
    "request and response": [logged()],
    "bodies inside": [{"request": {"body": request()}, "response": {"status_code": 200, "body": response()}}],
    "a body and a response with one": [{"body": request(), "response": {"body": response()}}],
    "JSON texts": [{"request": json.dumps(request()), "response": json.dumps(response())}],
    "LiteLLM": [{**request(), "response": response(), "status": "success", "call_type": "acompletion"}],
    "kwargs": [{"kwargs": request(), "response_obj": response()}],
    "input and output": [{"input": [HI], "output": {**HELLO, "finish_reason": "stop"}, "model": "target"}],
    "inputs with messages": [{"inputs": request(), "outputs": response()}],
    "batch input, then output": [
        {"custom_id": "r", "method": "POST", "url": "/v1/chat/completions", "body": request()},
        {"id": "b", "custom_id": "r", "response": {"status_code": 200, "body": response()}, "error": None},
    ],
    "batch output, then input": [
        {"id": "b", "custom_id": "r", "response": {"status_code": 200, "body": response()}, "error": None},
        {"custom_id": "r", "method": "POST", "url": "/v1/chat/completions", "body": request()},
    ],
    "chunks": [
        {
            "request": request(stream=True),
            "response": [chunk(role="assistant"), chunk(content="Hel"), chunk(content="lo."), chunk("stop")],
        }
    ],
    "lines of a stream": [
        {"request": request(stream=True), "response": sse(chunk(content="Hel"), chunk("stop", content="lo."))}
    ],
    "list of lines": [
        {"request": request(), "response": ["data: " + json.dumps(chunk(content="Hello.")), sse(chunk("stop"))]}
    ],
    "usage in a last chunk": [
        {
            "request": request(),
            "response": sse(chunk("stop", content="Hello."), {"id": "r", "choices": [], "usage": {"total_tokens": 9}}),
        }
    ],
    "/v1/responses": [
        {
            "request": {"model": "target", "input": "Hi"},
            "response": {
                "id": "r",
                "model": "target",
                "status": "completed",
                "output": [{"type": "message", "content": [{"type": "output_text", "text": "Hello."}]}],
            },
        }
    ],
    "parts that are text": [
        {"request": request({"role": "user", "content": [{"type": "text", "text": "Hi"}]}), "response": response()}
    ],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_logs(shape: str, convert: Callable[..., list[Row]]) -> None:
    (row,) = convert(*SHAPES[shape])
    assert row["messages"] == [HI, HELLO]
    assert (row["source"], row["finish_reason"], row["model"]) == ("logs", "stop", "target")
    if shape != "input and output":
        assert row["id"] == "r"


def test_reasoning_and_tool_calls_whole_and_streamed(convert: Callable[..., list[Row]]) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "add", "arguments": "not JSON"}},
    ]
    whole = {
        "request": request(tools=tools),
        "response": response(None, "tool_calls", reasoning_content="I add.", tool_calls=calls),
    }

    def piece(index: int, **function: str) -> Row:
        return {"index": index, "function": function}

    pieces = [
        chunk(role="assistant", content=None, reasoning="I "),
        chunk(reasoning="add."),
        chunk(tool_calls=[{"id": "c1", "type": "function", **piece(0, name="add", arguments="")}]),
        chunk(tool_calls=[piece(0, arguments='{"a"')]),
        chunk(tool_calls=[piece(0, arguments=": 1}")]),
        chunk(tool_calls=[{"id": "c2", "type": "function", **piece(1, name="add", arguments="not JSON")}]),
        chunk("tool_calls"),
    ]
    streamed = {"request": request(tools=tools), "response": sse(*pieces)}
    for log in (whole, streamed):
        (row,) = convert(log)
        assert row["tools"] == tools
        assert row["finish_reason"] == "tool_calls"
        answer = row["messages"][-1]
        assert answer["content"] in (None, "")
        assert answer["reasoning_content"] == "I add."
        assert [call["function"]["arguments"] for call in answer["tool_calls"]] == [{"a": 1}, "not JSON"]
        assert [call["id"] for call in answer["tool_calls"]] == ["c1", "c2"]


def test_responses_api_with_tools(convert: Callable[..., list[Row]]) -> None:
    given = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "3"},
    ]
    output = [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "So."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is"}]},
    ]
    body = {"id": "r", "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "output": output}
    asked = {"model": "m", "instructions": "Be kind.", "input": given, "tools": [{"type": "function", "name": "add"}]}
    (row,) = convert({"request": asked, "response": body})
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert row["messages"][2]["weight"] == 0
    assert row["messages"][-1] == {
        "role": "assistant",
        "content": "It is",
        "reasoning_content": "So.",
        "finish_reason": "length",
    }
    assert row["tools"] == [{"type": "function", "function": {"name": "add"}}]


def test_several_choices_are_several_rows(convert: Callable[..., list[Row]]) -> None:
    body = response()
    body["choices"] += [response("Hey.", "length")["choices"][0] | {"index": 1}]
    body["choices"] += [response("No.", "content_filter")["choices"][0] | {"index": 2}]
    rows = convert({"request": request(n=3), "response": body})
    assert [(row["id"], row["messages"][-1]["content"]) for row in rows] == [("r", "Hello."), ("r/1", "Hey.")]
    pieces = [chunk(content="A", index=1), chunk(content="B"), chunk("stop"), chunk("stop", index=1)]
    rows = convert({"request": request(n=2), "response": pieces})
    assert [row["messages"][-1]["content"] for row in rows] == ["B", "A"]


@pytest.mark.parametrize(
    ("log", "is_cut"),
    [
        (logged("Hel", finish="length"), True),
        ({"request": request(), "response": sse(chunk(content="Hel"), done=False)}, True),
        ({"request": request(), "response": sse(chunk(content="Hel"), done=False) + 'data: {"id": "r", "ch'}, True),
        ({"request": request(), "response": "Hel"}, True),  # nothing says that this text has ended
        (logged("Hel", finish=None), True),
        ({"request": request(stop=["lo"]), "response": response("Hel")}, True),
        ({"request": request(stop=["."]), "response": response("Hel")}, True),
        (logged("Hel"), False),
    ],
)
def test_answers_without_their_end(log: Row, is_cut: bool, convert: Callable[..., list[Row]]) -> None:
    (row,) = convert(log)
    assert row["messages"][-1] == {"role": "assistant", "content": "Hel"} | (
        {"finish_reason": "length"} if is_cut else {}
    )
    if is_cut:
        with pytest.raises(DataError, match=r"no answer to train on is left; 1 cut answers"):
            convert(log, on_cut="drop")


def test_a_stop_reason_tells_stop_strings_from_the_end(convert: Callable[..., list[Row]]) -> None:
    asked = request(stop=["."])
    bodies = [response("A"), response("B")]
    bodies[0]["choices"][0]["stop_reason"], bodies[1]["choices"][0]["stop_reason"] = None, "."
    ended, stopped = convert(*({"request": asked, "response": body} for body in bodies))
    assert "finish_reason" not in ended["messages"][-1]
    assert stopped["messages"][-1]["finish_reason"] == "length"


def test_what_teaches_nothing_is_left_out_and_counted(
    convert: Callable[..., list[Row]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    rows = convert(
        logged(),
        logged("No.", finish="content_filter"),
        {"request": request(), "response": {"error": {"message": "overloaded"}}},
        {"request": request(), "response": {"status_code": 500, "body": {}}},
        {"request": request(), "response": [{"error": "lost"}]},
        {**request(), "response": "", "status": "failure"},
        {"custom_id": "x", "response": None, "error": {"code": "batch_expired"}},
        logged("", HI),
        logged("A cat.", image),
        logged("lo.", HI, {"role": "assistant", "content": "Hel"}),
        {"custom_id": "y", "method": "POST", "body": request()},
        logged(),
    )
    assert len(rows) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"logs: 2 answers; 1 rows in {tmp_path}/out/train.jsonl, none held out; left out: ")
    for part in (
        *("1 filtered", "5 errors", "1 empty answers", "1 with images or audio", "1 continued answers"),
        *("1 requests without a response", "1 duplicates"),
    ):
        assert part in said
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["rows"] == {"train.jsonl": 1}
    assert manifest["left out"]["errors"] == 5
    assert not (tmp_path / "out" / "heldout.jsonl").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "train.jsonl"]


BYE, GOODBYE = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Goodbye."}


def test_a_chat_that_was_logged_turn_by_turn_is_one_row(
    convert: Callable[..., list[Row]], capsys: pytest.CaptureFixture[str]
) -> None:
    third = {"role": "user", "content": "Still there?"}
    rows = convert(
        logged(),
        logged("Goodbye.", HI, HELLO, BYE, finish="length"),
        logged("Yes.", HI, HELLO, BYE, GOODBYE, third),
        logged("Another.", {"role": "user", "content": "Else"}),
    )
    assert [row["messages"][-1]["content"] for row in rows] == ["Yes.", "Another."]
    assert rows[0]["messages"][1] == HELLO
    assert rows[0]["messages"][3] == GOODBYE | {"finish_reason": "length"}  # it was cut when it was written
    assert "2 continued in longer chats" in capsys.readouterr().out


def test_no_answer_is_trained_on_twice(convert: Callable[..., list[Row]]) -> None:
    """Branches share the first answer; an answer that no log shows to be the target's is context; reasoning, which
    later requests do not hold, keeps a row of its own."""
    other = {"role": "user", "content": "Or not"}
    one, two = convert(logged(), logged("Goodbye.", HI, HELLO, BYE), logged("Fine.", HI, HELLO, other))
    assert one["messages"][1] == HELLO
    assert two["messages"][1] == HELLO | {"weight": 0}
    (row,) = convert(logged("Goodbye.", HI, {"role": "assistant", "content": "Example."}, BYE))
    assert row["messages"][1]["weight"] == 0
    own, later = convert(logged(reasoning_content="A greeting."), logged("Goodbye.", HI, HELLO, BYE))
    assert own["messages"][1] == HELLO | {"reasoning_content": "A greeting."}
    assert later["messages"][1] == HELLO | {"weight": 0}
    rows = convert(logged(), logged("Hey."), logged(), logged("Goodbye.", HI, HELLO, BYE))
    assert [row["messages"][-1]["content"] for row in rows] == ["Hey.", "Goodbye."]


def test_context_of_weight_0_is_not_supervised() -> None:
    tokenizer = train_tokenizer(["Hi Hello. Bye Goodbye."], vocab_size=300)
    (sample,) = render_samples(tokenizer, [HI, HELLO | {"weight": 0}, BYE, GOODBYE])
    learned = [token for token, mask in zip(sample.input_ids, sample.loss_mask, strict=True) if mask]
    assert tokenizer.decode(learned) == "Goodbye.<|im_end|>"
    assert "Hello." in tokenizer.decode(sample.input_ids)


def test_several_models_are_not_mixed(convert: Callable[..., list[Row]]) -> None:
    others = {"request": request(BYE, model="small"), "response": response() | {"model": "small-2024"}}
    with pytest.raises(
        ConfigError, match=r"several models: target \(2 answers\), small-2024 \(1 answers\).*model=NAME"
    ):
        convert(logged(), logged("Hey."), others)
    assert [row["model"] for row in convert(logged(), others, model="small")] == ["small-2024"]
    with pytest.raises(DataError, match="no answer to train on is left; 1 of other models"):
        convert(logged(), model="large")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: malformed JSON"),
        (
            {"prompt": "Hi", "response": {"choices": [{"text": "x"}]}},
            "line 2: a request of /v1/completions: its prompt",
        ),
        ({"request": {"prompt": "Hi"}, "response": response()}, "line 2: a request of /v1/completions"),
        ({"request": request(), "response": {"choices": [{"text": "x"}]}}, "line 2: a response of /v1/completions"),
        ({"messages": [HI, HELLO]}, r"line 2: no response to be found; found the keys \['messages'\]"),
        ({"response": response()}, r"line 2: no request with messages to be found"),
        ({"level": "info"}, r"line 2: no request with messages and response to be found; found the keys \['level'\]"),
        ({"request": request(), "response": {"x": 1}}, r"line 2: the response has no choices; found the keys \['x'\]"),
        ({"request": request(), "response": {"choices": [3]}}, r"line 2: of no known shape \(TypeError"),
        ({"request": {"messages": ["Hi"]}, "response": response()}, r"line 2: messages\[0\]: expected a message"),
    ],
)
def test_bad_lines(
    line: Any, message: str, convert: Callable[..., list[Row]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=rf"log\.jsonl, {message}.*; on_bad_row=skip leaves such lines out"):
        convert(logged(), line)
    assert len(convert(logged(), line, on_bad_row="skip")) == 1
    assert "1 bad lines" in capsys.readouterr().out


FILTER = """
def mask(row):
    if "secret" in row["messages"][0]["content"]:
        return None
    row["messages"][0]["content"] = row["messages"][0]["content"].replace("Ann", "NAME")
    return row

def fails(row):
    return row["nothing"]

def forgets(row):
    row["messages"].pop()
    return row
"""


def test_a_filter_for_personal_data(
    convert: Callable[..., list[Row]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "privacy.py"
    file.write_text(FILTER, encoding="utf-8")
    log = [
        logged("Hello Ann.", {"role": "user", "content": "I am Ann"}),
        logged("Hm.", {"role": "user", "content": "A secret"}),
    ]
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{file}:mask", "privacy:mask"):
        (row,) = convert(*log, filter=name)
        assert row["messages"][0]["content"] == "I am NAME"
        assert "left out: 1 by the filter" in capsys.readouterr().out
    with pytest.raises(
        DataError, match=r"log\.jsonl, line 1: filter privacy:fails failed on row r \(KeyError: 'nothing'\)"
    ):
        convert(*log, filter="privacy:fails")
    with pytest.raises(DataError, match=r"line 1: filter privacy:forgets must return the row, whose messages end with"):
        convert(*log, filter="privacy:forgets")
    with pytest.raises(ConfigError, match=r"privacy has no function maks.* Did you mean 'mask'"):
        convert(*log, filter="privacy:maks")
    with pytest.raises(ConfigError, match=r"filter=nowhere:f: nowhere cannot be imported \(ModuleNotFoundError"):
        convert(*log, filter="nowhere:f")
    with pytest.raises(ConfigError, match=r"expected MODULE:FUNCTION or FILE\.py:FUNCTION"):
        convert(*log, filter="privacy")


def test_held_out_chats(convert: Callable[..., list[Row]], tmp_path: Path) -> None:
    log = []
    for number in range(60):
        begins = {"role": "user", "content": f"Question {number}"}
        log += [logged(f"Answer {number}", begins), logged("Goodbye.", begins, HELLO, BYE)]
    train = convert(*log, held_out_fraction=0.3)
    held_out = [json.loads(line) for line in (tmp_path / "out" / "heldout.jsonl").read_text().splitlines()]
    assert len(train) + len(held_out) == 120
    assert 20 <= len(held_out) <= 56
    begins = [{row["messages"][0]["content"] for row in rows} for rows in (train, held_out)]
    assert not begins[0] & begins[1]
    assert all(is_held_out(row["messages"], 0.3) for row in held_out)
    again = convert(*log[:20], held_out_fraction=0.3)  # another log puts the same chats on the same side
    assert all(row["messages"][0]["content"] in begins[0] for row in again)


def test_details_of_rows(convert: Callable[..., list[Row]], capsys: pytest.CaptureFixture[str]) -> None:
    developer = {"role": "developer", "content": "Be kind."}
    off = {"enable_thinking": False}
    rows = convert(
        {"request": request(developer, HI, chat_template_kwargs=off), "response": response()},
        logged("Hey."),
        logged("\ud83d cut"),
        {"request": request(BYE), "response": [chunk(content="\ud83d"), chunk("stop", content="\ude00")]},
    )
    assert rows[0]["messages"][0] == {"role": "system", "content": "Be kind."}
    assert rows[0]["chat_template_kwargs"] == off
    assert rows[2]["messages"][-1]["content"] == "\ufffd cut"
    assert rows[3]["messages"][-1]["content"] == "\U0001f600"
    assert len({row["id"] for row in rows}) == 4  # a server that repeats an id
    assert '{} (3 answers), {"enable_thinking": false} (1 answers)' in capsys.readouterr().out


def test_packed_logs_of_several_files(tmp_path: Path) -> None:
    batch_in = {"custom_id": "a", "body": request()}
    batch_out = {"custom_id": "a", "response": {"status_code": 200, "body": response()}}
    for name, row in (("in.jsonl.gz", batch_in), ("out.jsonl.gz", batch_out)):
        (tmp_path / name).write_bytes(gzip.compress(json.dumps(row).encode()))
    logs = [str(tmp_path / "in.jsonl.gz"), str(tmp_path / "out.jsonl.gz")]
    main(LogsOptions(logs, str(tmp_path / "out"), held_out_fraction=0.0))
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logs": []}, r"logs=\[\]: name at least one"),
        ({"on_cut": "kepe"}, r"on_cut=kepe: must be one of keep, drop. Did you mean 'keep'"),
        ({"on_bad_row": "drop"}, r"on_bad_row=drop: must be one of stop, skip"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction=1.0: must be at least 0 and below 1"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(LogsOptions(**({"logs": ["x"]} | options)))


def test_nothing_is_left_behind_when_it_stops(convert: Callable[..., list[Row]], tmp_path: Path) -> None:
    convert(logged())
    before = (tmp_path / "out" / "train.jsonl").read_text()
    with pytest.raises(DataError):
        convert(logged("Hey."), "{")
    assert (tmp_path / "out" / "train.jsonl").read_text() == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "train.jsonl"]

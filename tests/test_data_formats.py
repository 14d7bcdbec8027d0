"""Formats: however a conversation is spelled, it is read the same, and a mistake is named."""

from __future__ import annotations

import json

import datasets
import pytest

from deepspec.data.formats import content_id, read_conversations
from deepspec.data.jsonl import DataError, RowError
from deepspec.data.turns import messages_of

USER, ANSWER = {"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5 é 🙂"}
TURNS = [USER, ANSWER]
SYSTEM = {"role": "system", "content": "s"}
SHAREGPT = {"conversations": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": ANSWER["content"]}]}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, *rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return name


def read(source, **options):
    return list(read_conversations([source], **options))


def only(row):
    (conversation,) = read(write("row.jsonl", row))
    return conversation


def refused(source, kind=DataError, **options):
    with pytest.raises(kind) as error:
        read(source, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": TURNS}, TURNS),
        (SHAREGPT, TURNS),
        ({"conversation": TURNS, "conversation_id": "x"}, TURNS),
        ({"conversations": {"from": ["human", "gpt"], "value": ["What is 2 + 3?", "5 é 🙂"]}}, TURNS),
        ({"messages": json.dumps(TURNS)}, TURNS),
        ({"prompt": USER["content"], "response": ANSWER["content"]}, TURNS),
        ({"prompt": USER["content"], "completion": ANSWER["content"]}, TURNS),
        ({"instruction": USER["content"], "input": "", "output": ANSWER["content"]}, TURNS),
        ({"input": USER["content"], "output": ANSWER["content"]}, TURNS),
        ({"question": USER["content"], "answer": ANSWER["content"], "system_prompt": ""}, TURNS),
        ({"prompt": USER["content"], "chosen": TURNS, "rejected": []}, TURNS),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": []}, TURNS),
        ({"prompt": [SYSTEM, USER], "chosen": TURNS}, [SYSTEM, *TURNS]),
        ({"chosen": TURNS, "rejected": TURNS}, TURNS),
        ({"prompt": USER["content"]}, [USER]),
        ({"prompt": USER["content"], "response": None}, [USER]),
        ({"problem": USER["content"], "solution": ANSWER["content"], "answer": "5"}, TURNS),
        ({"turns": [USER["content"]]}, [USER]),
        ({"turns": ["a", "b"]}, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]),
        ({"question": USER["content"], "answer": ANSWER["content"], "system": "s"}, [SYSTEM, *TURNS]),
        ({"messages": [SYSTEM, USER], "system": "other"}, [SYSTEM, USER]),
        ({"instruction": "Sum", "input": "2 3", "output": None}, [{"role": "user", "content": "Sum\n\n2 3"}]),
    ],
)  # fmt: skip
def test_formats(row, messages):
    assert only(row).messages == messages


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "a", **SHAREGPT}, "ShareGPT conversations (columns conversations, id)"),
        ({"messages": TURNS, "score": 1}, "OpenAI messages (columns messages; not read: score)"),
        ({"instruction": "a", "output": "b"}, "Alpaca instructions (columns instruction, output)"),
        ({"question": "a", "answer": "b"}, "questions and answers (columns question, answer)"),
        ({"turns": ["a"]}, "prompts without answers (columns turns)"),
        ({"prompt": "a", "chosen": TURNS}, "preferences, of which the chosen answer is read (columns prompt, chosen)"),
    ],
)
def test_the_format_is_said_once(row, said):
    lines = []
    read(write("train.jsonl", row, row), on_format=lines.append)
    assert lines == [f"train.jsonl: {said}"]


def test_a_change_of_format_is_said_with_its_place():
    lines = []
    read(write("a.jsonl", {"messages": TURNS}, {"messages": TURNS, "tools": []}, SHAREGPT), on_format=lines.append)
    assert lines[1:] == ["a.jsonl, line 3: ShareGPT conversations (columns conversations)"]


@pytest.mark.parametrize(
    ("given", "read_as"),
    [
        *[(name, "user") for name in ("user", "User", "human", "HUMAN ")],
        *[(name, "assistant") for name in ("assistant", "gpt", "chatgpt", "bard", "model", "bot", "Assistant")],
        *[(name, "tool") for name in ("tool", "function", "observation")],
        *[(name, name) for name in ("system", "developer", "ipython")],
    ],
)
def test_roles(given, read_as):
    assert messages_of("p", "c", [{"from": given, "value": "x"}]) == [{"role": read_as, "content": "x"}]


def test_messages_keep_what_templates_read():
    parts = [{"type": "text", "text": "hi"}, {"type": "image"}]
    message = {
        "role": "assistant",
        "content": parts,
        "reasoning_content": "hm",
        "name": "n",
        "weight": None,
        "raw": "x",
    }
    assert only({"messages": [message]}).messages == [{k: v for k, v in message.items() if v is not None}]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "tool_calls": [CALL]},
        {"tool_calls": [CALL]},
        {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"city": "Oslo"}'}}]},
        {"content": None, "tool_calls": [{"name": "f", "arguments": {"city": "Oslo"}}]},
        {"content": None, "tool_calls": json.dumps([CALL])},
        {"content": None, "function_call": {"name": "f", "arguments": '{"city": "Oslo"}'}},
        {"role": "function_call", "content": '{"name": "f", "arguments": {"city": "Oslo"}}'},
    ],
)  # fmt: skip
def test_tool_calls_come_to_one_form(message):
    expected = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert only({"messages": [USER, {"role": "assistant", **message}]}).messages == [USER, expected]


def test_arguments_that_are_no_object_stay_text():
    call = {"type": "function", "function": {"name": "f", "arguments": "{city"}}
    (message,) = only({"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}).messages
    assert message["tool_calls"] == [call]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"functions": [TOOL["function"]]},
        {"tools": [{"type": "function", **TOOL["function"]}]},
    ],
)
def test_tools_come_to_one_form(columns):
    assert only({"messages": TURNS, **columns}).tools == [TOOL]


@pytest.mark.parametrize("empty", [None, [], "", "[]"])
def test_no_tools(empty):
    assert only({"messages": TURNS, "tools": empty}).tools is None


@pytest.mark.parametrize("kind", ["a.parquet", "saved"])
def test_keys_that_arrow_adds_are_dropped(kind):
    """Arrow gives every struct every key: of other messages, other arguments, other tools."""
    other = {"type": "function", "function": {"name": "g", "arguments": {"unit": "C"}}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL, other]}]
    tools = [TOOL, {"type": "function", "function": {"name": "g", "description": "d"}}]
    rows = datasets.Dataset.from_list([{"messages": messages, "tools": tools}])
    rows.to_parquet(kind) if kind == "a.parquet" else rows.save_to_disk(kind)
    (conversation,) = read(kind)
    assert conversation.messages == messages
    assert conversation.tools == tools


def test_ids():
    assert [only({name: 7, "messages": TURNS}).id for name in ("id", "conversation_id", "uuid")] == ["7"] * 3
    digest = content_id(TURNS)
    rows = [{"messages": TURNS}, {"id": None, "messages": TURNS}, {"id": "", **SHAREGPT}, {"id": {}, "messages": TURNS}]
    assert {only(row).id for row in rows} == {digest}
    assert only({"messages": TURNS, "tools": [TOOL]}).id != digest


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "messages: the list is empty"),
        ({"messages": None}, "messages: expected a list of messages, found NoneType"),
        ({"id": "x"}, "no known format: found the columns id."),
        ({"messages": "hi"}, "messages: expected a list of messages, found str"),
        ({"messages": "[hi"}, "messages: a text that is not JSON"),
        ({"messages": ["hi"]}, "messages[0]: expected a message with role and content, found 'hi'"),
        ({"messages": [{"content": "x"}]}, "messages[0]: no role; the keys are content; expected one of system,"),
        ({"messages": [USER, {"role": None, "content": "x"}]}, "messages[1]: the role is None"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0]: unknown role 'usr'; expected one of system"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "Did you mean 'user'?"),
        ({"messages": [{"role": "user"}]}, "messages[0] (user): no content; the keys are role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content (user): null, which only goes with"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content (assistant): null"),
        ({"messages": [{"role": "user", "content": 3}]}, "expected a text or a list of parts, found 3"),
        ({"conversations": [{"from": "gpt", "value": {}}]}, "conversations[0].value (assistant): expected a text"),
        ({"messages": [{**ANSWER, "tool_calls": {}}]}, "messages[0].tool_calls: expected a list, found dict"),
        ({"messages": [{**ANSWER, "tool_calls": ["f"]}]}, "messages[0].tool_calls[0]: expected"),
        ({"messages": TURNS, "tools": "f"}, "tools: a text that is not JSON"),
        ({"messages": TURNS, "tools": {"f": 1}}, "tools: expected a list of functions, found dict"),
        ({"messages": TURNS, "tools": [1]}, "tools[0]: expected a function as a JSON schema, found 1"),
        ({"messages": TURNS, "system": 3}, "system: expected a text, found 3"),
        ({"prompt": 3, "response": "x"}, "prompt: expected a text or a list of messages, found 3"),
        ({"question": "a", "context": {"x": 1}, "answer": "b"}, "context: expected a text beside a prompt"),
        ({"text": "x"}, "no known format: found the columns text. Plain text has no turns"),
        ({"message": []}, "found the columns message. Rename 'message' to 'messages'"),
        ({"Prompt": "x"}, "Rename 'Prompt' to 'prompt'"),
        ({"response": "x"}, "'response' is an answer without its question: add a column 'prompt'"),
        ({"data": [{"messages": []}]}, "The rows seem to be listed under 'data'"),
        ({"x": 1, "y": 2}, "found the columns x, y. Nearest is the OpenAI format: give a column 'messages'"),
        ({}, "found the columns none"),
        ({"x": 1}, "Accepted are messages (OpenAI), conversations (ShareGPT), prompt + response"),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(row, message):
    source = write("bad.jsonl", {"messages": TURNS}, row, {"messages": TURNS})
    said = refused(source, RowError)
    assert said.startswith("bad.jsonl, line 2: ")
    assert message in said
    skipped = []
    assert len(read(source, on_bad_row=skipped.append)) == 2
    assert [str(error) for error in skipped] == [said]


def test_a_source_without_a_good_row_is_refused_even_where_bad_rows_are_skipped():
    skipped = []
    assert "few.jsonl: none of the 3 rows can be used" in refused(
        write("few.jsonl", *[{"text": "x"}] * 3), on_bad_row=skipped.append
    )
    said = refused(write("many.jsonl", *[{"text": "x"}] * 500), on_bad_row=skipped.append)
    assert said.startswith("many.jsonl: none of the first 100 rows can be used; the last one: many.jsonl, line 100: no")

"""Prompt sets: reading, rendering, and mistakes in them."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from deepspec.config import ConfigError
from deepspec.data.chat import render_prompt
from deepspec.data.jsonl import DataError
from deepspec.data.prompts import read_prompt
from deepspec.data.tokenizer import train_tokenizer
from deepspec.evaluation.sets import load_set


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["What is two plus two?"], vocab_size=280)


def write(folder: Path, name: str, *lines: str) -> None:
    (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_every_turn_is_rendered_behind_the_answers(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write(tmp_path, "chat", '{"turns": ["What is two?", "Sure?"]}', '{"turns": ["plus"]}', '{"turns": ["two"]}')
    prompts = load_set("chat", tmp_path, tokenizer, limit=2)
    assert [(prompt.index, len(prompt.given)) for prompt in prompts] == [(0, 2), (1, 1)]
    assert prompts[0].ids == render_prompt(tokenizer, [user("What is two?")])
    assert tokenizer.decode(prompts[0].ids).endswith("<|im_start|>assistant\n")
    messages = [user("What is two?"), {"role": "assistant", "content": "plus"}, user("Sure?")]
    assert prompts[0].ids_after(["plus"]) == render_prompt(tokenizer, messages)
    (first, _) = load_set("chat", tmp_path, tokenizer, limit=2, first_turn_only=True)
    assert (len(first.given), first.ids, first.later) == (1, prompts[0].ids, None)


def test_system_prompt_and_tools_are_rendered_in_every_turn(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = "{{ tools | length }} tools" + str(tokenizer.chat_template)
    row = {"turns": ["What is two?", "Sure?"], "system": "plus", "tools": tools}
    write(tmp_path, "chat", json.dumps(row))
    (prompt,) = load_set("chat", tmp_path, tokenizer)
    system = {"role": "system", "content": "plus"}
    assert prompt.ids == render_prompt(tokenizer, [system, user("What is two?")], tools=tools)
    assert tokenizer.decode(prompt.ids).startswith("1 tools")
    messages = [system, user("What is two?"), {"role": "assistant", "content": ""}, user("Sure?")]
    assert prompt.ids_after([""]) == render_prompt(tokenizer, messages, tools=tools)
    same = {"messages": [system, user("What is two?"), user("Sure?")], "tools": tools}
    write(tmp_path, "messages", json.dumps(same))
    (other,) = load_set("messages", tmp_path, tokenizer)
    assert (other.given, other.ids, other.later) == (prompt.given, prompt.ids, prompt.later)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("user assistant", ["user"]),  # a row to train on: its last answer is not kept
        ("user user assistant assistant", ["user", "user"]),
        ("system user assistant user", ["system user assistant user"]),  # an earlier answer is history
        ("user assistant user user", ["user assistant user", "user"]),
        ("user assistant tool tool", ["user assistant tool tool"]),
        ("user assistant tool user assistant", ["user assistant tool", "user"]),
        ("user system user", ["user", "system user"]),
    ],
)
def test_where_messages_are_answered(roles: str, expected: list[str]) -> None:
    messages = [{"role": role, "content": "x"} for role in roles.split()]
    given = read_prompt({"messages": messages}, "here").given
    assert [" ".join(message["role"] for message in turn) for turn in given] == expected


def test_unknown_set_lists_those_that_exist(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write(tmp_path, "math", '{"turns": ["x"]}')
    write(tmp_path, "code", '{"turns": ["x"]}')
    with pytest.raises(ConfigError, match=r"no set 'maths'.*code, math.*Did you mean 'math'"):
        load_set("maths", tmp_path, tokenizer)
    with pytest.raises(ConfigError, match=r"eval\.prompts_dir=.*no such folder"):
        load_set("math", tmp_path / "nowhere", tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"turns": []}', "at least one turn"),
        ('{"prompt": "x"}', r"found the keys \['prompt'\]"),
        ('{"turns": ["  "]}', "non-empty text"),
        ('{"turns": [3]}', "non-empty text, found 3"),
        ('{"turns": ["x"', "malformed JSON"),
        ('{"turns": ["x", ""]}', "turn 2 must be a non-empty text, found ''"),
        ('{"turns": "x"}', "a list with at least one turn under 'turns', found 'x'"),
        ('{"turns": ["x"], "system": ""}', "'system' must be a non-empty text"),
        ('{"turns": ["x"], "tools": {}}', "tools: expected a list of functions, found dict"),
        ('{"question": "x", "answer": "3"}', r"found the keys \['answer', 'question'\].*python -m data_prep.eval_sets"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "must end with one that the model answers, from user"),
        ('{"messages": [{"role": "user", "content": null}]}', r"messages\[0\].content \(user\): null"),
        ('{"messages": [{"content": "x"}]}', r"messages\[0\]: no role; the keys are content"),
        ('{"messages": [{"role": "user", "content": " "}]}', r"messages\[0\] \(user\) must be a non-empty text"),
        ('{"messages": []}', "messages: the list is empty"),
        (
            '{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}], "system": "y"}',
            "keep one",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: str, message: str) -> None:
    write(tmp_path, "math", '{"turns": ["fine"]}', line)
    with pytest.raises(DataError, match=rf"math\.jsonl, line 2.*{message}"):
        load_set("math", tmp_path, tokenizer)


def test_a_template_that_refuses_a_prompt_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = "{% if messages | length > 1 %}{{ raise_exception('no system') }}{% endif %}x"
    write(tmp_path, "chat", '{"turns": ["x", "y"]}', '{"turns": ["x"], "system": "y"}')
    (prompt,) = load_set("chat", tmp_path, tokenizer, limit=1)
    with pytest.raises(DataError, match=r"chat\.jsonl, line 1: turn 2: the chat template refuses it: .no system."):
        prompt.ids_after(["z"])
    with pytest.raises(DataError, match=r"chat\.jsonl, line 2: the chat template refuses it: .no system."):
        load_set("chat", tmp_path, tokenizer)

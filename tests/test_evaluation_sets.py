"""Prompt sets: reading, rendering, and mistakes in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from deepspec.config import ConfigError
from deepspec.data.chat import render_prompt
from deepspec.data.jsonl import DataError
from deepspec.data.tokenizer import train_tokenizer
from deepspec.evaluation.sets import load_set


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["What is two plus two?"], vocab_size=280)


def write(folder: Path, name: str, *lines: str) -> None:
    (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def test_only_the_first_turn_is_rendered(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write(tmp_path, "chat", '{"turns": ["What is two?", "Sure?"]}', '{"turns": ["plus"]}', '{"turns": ["two"]}')
    prompts = load_set("chat", tmp_path, tokenizer, limit=2)
    assert [(prompt.index, prompt.text) for prompt in prompts] == [(0, "What is two?"), (1, "plus")]
    assert prompts[0].ids == render_prompt(tokenizer, [{"role": "user", "content": "What is two?"}])
    assert tokenizer.decode(prompts[0].ids).endswith("<|im_start|>assistant\n")


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
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: str, message: str) -> None:
    write(tmp_path, "math", '{"turns": ["fine"]}', line)
    with pytest.raises(DataError, match=rf"math\.jsonl, line 2.*{message}"):
        load_set("math", tmp_path, tokenizer)

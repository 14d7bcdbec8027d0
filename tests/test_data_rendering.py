"""A draft keeps how its prompts were rendered, and is measured on prompts rendered alike."""

from __future__ import annotations

import json

import pytest
from transformers import Qwen3Config

from deepspec.cli import let_into_dictionaries
from deepspec.config import DataConfig, TrainRun
from deepspec.data.rendering import Rendering, as_in_training, differences_of_answers
from deepspec.evaluation.plan import _rendered_as
from deepspec.targets import load_tokenizer

OPTIONS = {"enable_thinking": False}


@pytest.fixture
def tokenizer():
    return load_tokenizer("builtin")


def trained_with(tokenizer, data):
    """The config of a draft, as it is read from its folder."""
    config = Qwen3Config()
    Rendering.of(tokenizer, data).record_in(config)
    return Qwen3Config.from_dict(json.loads(config.to_json_string(use_diff=False)))


def test_options_and_system_prompt_are_those_of_training(tokenizer):
    draft = trained_with(tokenizer, DataConfig(template_options=OPTIONS, system_prompt="Be brief."))
    used, note = _rendered_as(DataConfig(), tokenizer, draft)
    assert (used.template_options, used.system_prompt) == (OPTIONS, "Be brief.")
    assert "as the draft was trained: data.template_options={'enable_thinking': False}" in note
    assert _rendered_as(DataConfig(), tokenizer, trained_with(tokenizer, DataConfig()))[1] is None


def test_what_is_told_otherwise_counts_and_is_said(tokenizer):
    draft = trained_with(tokenizer, DataConfig(template_options=OPTIONS | {"x": 1}, system_prompt="Be brief."))
    given = DataConfig(template_options={"enable_thinking": True}, system_prompt="")
    used, note = _rendered_as(given, tokenizer, draft)
    assert (used.template_options, used.system_prompt) == ({"enable_thinking": True, "x": 1}, None)
    assert "otherwise" in note
    assert "data.template_options.enable_thinking is True, in training it was False" in note
    assert "data.system_prompt is None, in training it was 'Be brief.'" in note


def test_a_template_of_its_own_goes_with_the_draft(tokenizer):
    own, other = load_tokenizer("builtin"), load_tokenizer("builtin")
    own.chat_template = "{{ messages[0].content }}"
    draft = trained_with(own, DataConfig(chat_template="a file that is gone by then"))
    assert _rendered_as(DataConfig(), tokenizer, draft)[1].endswith("data.chat_template=the draft's own")
    assert tokenizer.chat_template == own.chat_template
    note = _rendered_as(DataConfig(chat_template="given"), other, draft)[1]
    assert "the chat template is another one than in training" in note


def test_drafts_of_others_say_nothing(tokenizer):
    used, note = _rendered_as(DataConfig(template_options=OPTIONS), tokenizer, Qwen3Config())
    assert used.template_options == OPTIONS
    assert "not recorded" in note
    assert as_in_training(DataConfig(), tokenizer, None) == DataConfig()


def test_answers_to_other_prompts_are_noticed(tokenizer, tmp_path):
    rendering = Rendering.of(tokenizer, DataConfig())
    settings = {"chat_template": rendering.template_sha256, "template_options": OPTIONS, "system_prompt": None}
    (tmp_path / ".regenerate").mkdir()
    (tmp_path / ".regenerate" / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (found,) = differences_of_answers([str(tmp_path), "file.jsonl"], rendering)
    assert found.endswith("data.template_options.enable_thinking is not set, when it was written it was False")
    assert not differences_of_answers([str(tmp_path)], Rendering.of(tokenizer, DataConfig(template_options=OPTIONS)))


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("data.template_options.enable_thinking=false", "++data.template_options.enable_thinking=false"),
        ("data.template_options={enable_thinking: false}", "++data.template_options={enable_thinking: false}"),
        ("+data.template_options.x=1", "+data.template_options.x=1"),
        ("~data.template_options.x", "~data.template_options.x"),
        ("data.max_length=8", "data.max_length=8"),
        ("data.template_optionsx=8", "data.template_optionsx=8"),
    ],
)
def test_entries_of_dictionaries_need_no_plus(typed, read):
    assert let_into_dictionaries(typed, TrainRun) == read
